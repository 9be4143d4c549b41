"""What wheels promise and how it is checked: versions, tags, old glibc, toolkits, machines."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_build import FAKE_NVCC, write_script

from tools import build_plan, check_wheel, cuda_toolkit, old_glibc, test_wheels, wheel_plan

SOURCE_VERSION = wheel_plan.source_version()


@pytest.mark.parametrize(
    ("archs", "cuda_version", "kernels", "label"),
    [
        ((), "", "", "cpu"),
        ((80, 90), "13.0", "", "cu130"),
        ((80, 90), "12.9", "fwd/sm80", "cu129.partial"),
        ((86,), "13.2", "", "cu132.sm86"),
    ],
)
def test_a_label_says_what_is_in_a_wheel(
    archs: tuple[int, ...], cuda_version: str, kernels: str, label: str
) -> None:
    assert wheel_plan.label(archs, cuda_version, kernels) == label


def test_only_wheels_for_others_have_a_label(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    write_script(folder / "nvcc", FAKE_NVCC.format(here=folder))
    environ = {"CUDA_HOME": str(tmp_path), "FLASH_ATTN_CUDA_ARCHS": "80;90"}
    assert wheel_plan.package_version(environ) == SOURCE_VERSION
    release = environ | {"FLASH_ATTN_RELEASE": "1"}
    assert wheel_plan.package_version(release) == f"{SOURCE_VERSION}.cu130"
    text = (build_plan.ROOT / "flash_attn" / "version.py").read_text()
    labelled = wheel_plan.with_version(text, "2.8.3+9.cpu")
    assert labelled == text.replace(SOURCE_VERSION, "2.8.3+9.cpu") != text


SYMBOLS = """\
0000000000089380 g    DF .text  0000000000000eed (GLIBC_2.2.5) pthread_create
0000000000089380 g    DF .text  0000000000000eed  GLIBC_2.34  pthread_create
0000000000039370 g    DF .text  000000000000005f (GLIBC_2.2.5) fmod
0000000000039370 g    DF .text  000000000000005f (GLIBC_2.17) fmod
0000000000039370 g    DF .text  000000000000005f  GLIBC_2.38  fmod
0000000000039370 g    DF .text  000000000000005f  GLIBC_2.14  memcpy
0000000000039370 g    DO .bss   0000000000000001  GLIBC_2.32  __libc_single_threaded
"""


def test_symbols_are_taken_in_their_last_old_version() -> None:
    versions = old_glibc.older_versions(SYMBOLS)
    assert versions == {"fmod": "2.17", "pthread_create": "2.2.5"}
    script = old_glibc.version_script(versions)
    assert script == ("GLIBC_2.2.5 { global: pthread_create; };\nGLIBC_2.17 { global: fmod; };\n")


NEW_GLIBC_USER = """\
#include <dlfcn.h>
#include <cmath>
#include <memory>
#include <thread>

extern "C" double f(double x) {
  auto const result = std::make_shared<double>(x);
  auto const copy = result;
  std::thread([copy] { *copy = dlsym(nullptr, "exp") ? std::exp(*copy) : -1.0; }).join();
  return *result;
}
"""


def test_a_library_linked_so_loads_beside_an_old_glibc(tmp_path: Path) -> None:
    """By what it asks for; it also loads and runs here."""
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text(NEW_GLIBC_USER)
    compile_it = ["c++", "-std=c++20", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
    inputs = old_glibc.link_inputs(tmp_path / "old")
    subprocess.run([*compile_it, *inputs, *old_glibc.link_args()], check=True)
    assert list(check_wheel.symbol_breaches(check_wheel.objdump("-T", library))) == []
    assert list(check_wheel.library_breaches(check_wheel.objdump("-p", library))) == []
    call = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).f; f.restype = ctypes.c_double; "
        "f.argtypes = [ctypes.c_double]; print(f(0.0))"
    )
    done = subprocess.run([sys.executable, "-c", call, str(library)], capture_output=True)
    assert done.stdout == b"1.0\n", done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0000 DF *UND*  0000 (GLIBC_2.34) dlopen", "needs dlopen of GLIBC_2.34; manylinux_2_28"),
        ("0000 DF *UND*  0000 (GLIBCXX_3.4.29) _ZSt1x", "GLIBCXX up to 3.4.24"),
        ("0000 DF *UND*  0000 (OPENMP_4.0) omp_x", "OPENMP up to none"),
        ("0000 DF *UND*  0000 _ZNK2at10TensorBase4sizeEv", "torch's C++ interface"),
        ("0000 DF *UND*  0000 Py_Initialize", "of Python; expected PyModule_Create2 only"),
        ("0000 DF *UND*  0000 (GLIBC_2.28) x", ""),
        ("0000 DF *UND*  0000 PyModule_Create2", ""),
        ("0000 g  DF .text 0000 Py_Initialize", ""),
    ],
)
def test_what_a_module_asks_for_is_judged(line: str, message: str) -> None:
    found = list(check_wheel.symbol_breaches(line))
    assert len(found) == bool(message) and all(message in sentence for sentence in found), found


def test_libraries_that_not_everyone_has_are_refused() -> None:
    headers = "  NEEDED               libc10.so\n  NEEDED               libtorch_cuda.so\n"
    headers += "  RUNPATH              /home/me/lib\n"
    cuda, path = check_wheel.library_breaches(headers)
    assert "libtorch_cuda.so, which not every machine" in cuda
    assert "RUNPATH /home/me/lib" in path


def make_wheel(folder: Path, files: dict[str, str], tag: str) -> Path:
    path = folder / f"flash_attn-{SOURCE_VERSION}.cpu-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def good_files() -> dict[str, str]:
    version = f"{SOURCE_VERSION}.cpu"
    metadata = f"Name: flash-attn\nVersion: {version}\nRequires-Dist: torch>=2.10\n"
    metadata += 'Requires-Dist: pytest; extra == "test"\n'
    return {
        "flash_attn/__init__.py": "",
        "flash_attn/py.typed": "",
        "flash_attn/version.py": f'__version__ = "{version}"\n',
        "flash_attn_2_cuda.py": "",
        "x.dist-info/METADATA": metadata,
        "x.dist-info/top_level.txt": "flash_attn\nflash_attn_2_cuda\n",
    }


TAG = f"cp310-abi3-{wheel_plan.platform_tag()}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.dist-info/METADATA", "Name: flash-attention\nVersion: 2.8.3+1\n", "name flash-attn,"),
        ("x.dist-info/METADATA", "Name: flash-attn\nVersion: 2.9.0\n", "and a label, got 2.9.0"),
        ("x.dist-info/top_level.txt", "flash_attn\n", "top_level.txt: expected"),
        ("flash_attn/version.py", '__version__ = "2.8.3"', "as in METADATA, got 2.8.3"),
        ("flash_attn/cute/__init__.py", "", "belongs to flash-attn-4"),
        ("flash_attn/libcudart.so.13", "", "as the one library, got ['flash_attn/libcudart"),
    ],
)
def test_metadata_and_contents_are_judged(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    no_module = "expected flash_attn/_C.abi3.so as the one library, got []"
    assert list(check_wheel.breaches(make_wheel(tmp_path, good_files(), TAG))) == [no_module]
    broken = make_wheel(tmp_path, good_files() | {name: text}, TAG)
    assert any(message in sentence for sentence in check_wheel.breaches(broken))


def test_tag_and_size_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_wheel(tmp_path, good_files(), "cp311-cp311-linux_x86_64")
    monkeypatch.setattr(wheel_plan, "MAX_MEGABYTES", 0)
    tag, size = check_wheel.name_breaches(path)
    assert f"expected the tag {TAG}" in tag and "expected at most 0 MB" in size


def test_a_missing_top_level_is_a_breach(tmp_path: Path) -> None:
    files = good_files()
    del files["x.dist-info/top_level.txt"]
    found = list(check_wheel.breaches(make_wheel(tmp_path, files, TAG)))
    assert "x.dist-info/top_level.txt is missing" in found


def test_toolkits_are_pinned_and_others_refused() -> None:
    assert cuda_toolkit.release_of("13.x") == cuda_toolkit.NEWEST
    for release in cuda_toolkit.TOOLKITS:
        assert f"nvidia-cuda-nvcc=={release}." in cuda_toolkit.requirements(release)[0]
    with pytest.raises(ValueError, match=r"expected one of 13\.0, .* got '12\.9'.* set CUDA_HOME"):
        cuda_toolkit.release_of("12.9")


FAKE_PIP = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --target ] && target="$2"; shift; done
cd "$target" && mkdir -p nvidia/cu13/bin nvidia/cu13/nvvm/bin nvidia/cu13/include nvidia/cu13/lib
cd nvidia/cu13 && touch bin/nvcc nvvm/bin/cicc include/cuda_runtime.h {library}
"""


def test_a_toolkit_is_laid_out_as_nvcc_and_torch_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    write_script(python, FAKE_PIP.format(library=""))
    with pytest.raises(RuntimeError, match="missing: lib64/libcudart_static.a. Set CUDA_HOME"):
        cuda_toolkit.find("13.0", cache=tmp_path / "toolkits")
    assert not (tmp_path / "toolkits" / "13.0").exists()
    write_script(python, FAKE_PIP.format(library="lib/libcudart_static.a"))
    home = cuda_toolkit.find("13.0", cache=tmp_path / "toolkits")
    assert home == tmp_path / "toolkits" / "13.0"
    assert all((home / part).exists() for part in cuda_toolkit.PARTS)
    write_script(python, "#!/bin/sh\nexit 1\n")  # not asked again
    assert cuda_toolkit.find("13.0", cache=tmp_path / "toolkits") == home


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_than_linux_get_a_clear_sentence(system: str) -> None:
    with pytest.raises(RuntimeError, match=f"expected Linux, got {system}.*WSL2"):
        build_plan.check_machine({"PATH": "/usr/bin:/bin"}, system)


def test_without_a_compiler_the_wheel_is_named(tmp_path: Path) -> None:
    write_script(tmp_path / "c++", "#!/bin/sh\n")
    build_plan.check_machine({"PATH": str(tmp_path)}, "Linux")
    with pytest.raises(RuntimeError, match=r"C\+\+20 compiler \(clang\+\+, .*install a wheel"):
        build_plan.check_machine({"PATH": str(tmp_path), "CXX": "clang++"}, "Linux")


def test_an_old_torch_is_refused_before_anything_is_compiled() -> None:
    for version in ("2.10.0", "2.10.0a0+git", "2.14.1+cu130", "3.0"):
        build_plan.check_torch(version)
    with pytest.raises(RuntimeError, match=r"expected torch 2\.10 or later, found 2\.9\.1"):
        build_plan.check_torch("2.9.1+cu128")


def test_every_python_and_every_torch_is_tried() -> None:
    here = Path(sys.executable)
    pythons = [Path("python3.10"), here, Path("python3.13")]
    pairs = test_wheels.pair(pythons, ["old", "middle", "new"])
    assert pairs[0][0] == here and pairs[0][1].startswith("torch==2.")
    assert pairs[1:] == [(pythons[0], "old"), (pythons[2], "middle"), (pythons[0], "new")]
    alone = test_wheels.pair([here], ["old", "new"])
    assert alone[1:] == [(here, "old"), (here, "new")]


def test_the_table_fails_on_any_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_environment(python: Path, torch: str) -> Path:
        raise test_wheels.Failed("no such torch")

    monkeypatch.setattr(test_wheels, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(test_wheels, "make_environment", make_environment)
    wheel = make_wheel(tmp_path, good_files(), TAG)
    assert test_wheels.main([str(wheel), "--here"]) == 1
    said = capsys.readouterr().out
    assert "no such torch" in said and "| - | FAILED |" in said
