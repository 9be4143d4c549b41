"""The build's own logic: architectures, sources, jobs, the nvcc gate, CUTLASS headers, ratchets."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from third_party import cutlass
from tools import build_plan, nvcc_gate, ratchets

FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--dryrun*) echo "#\\$ _HERE_={here}" ;;
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_86\\ncompute_90\\n' ;;
  *) while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done; cat "{here}/output" ;;
esac
"""
FAKE_NVIDIA_SMI = "#!/bin/sh\nprintf '{capabilities}'\n"


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_plan, "USUAL_CUDA_HOME", tmp_path / "nowhere")


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    folder = tmp_path / "cuda" / "bin"
    write_script(folder / "nvcc", FAKE_NVCC.format(here=folder))
    return folder


def with_gpu(folder: Path, capabilities: str) -> dict[str, str]:
    """Environment whose PATH has nvcc and an nvidia-smi that lists `capabilities`."""
    script = FAKE_NVIDIA_SMI.format(capabilities="\\n".join(capabilities.split()) + "\\n")
    write_script(folder / "nvidia-smi", script)
    return {"PATH": f"{folder}:/bin:/usr/bin"}


def test_without_nvcc_the_cpu_backend_is_built_and_the_note_says_how_to_get_more(
    no_toolkit: None, tmp_path: Path
) -> None:
    plan = build_plan.make_plan({"PATH": str(tmp_path)})
    assert plan.archs == ()
    assert plan.note.startswith("CPU backend only: no CUDA compiler")
    assert 'FLASH_ATTN_CUDA_ARCHS="80;90"' in plan.note
    assert "\n" not in plan.note


@pytest.mark.parametrize(
    ("capabilities", "archs", "note"),
    [
        ("8.0", (80,), "architectures 80 with nvcc"),
        ("9.0 9.0 8.6", (86, 90), "architectures 86;90 with nvcc"),
        ("12.0", (90,), "architectures 90 with nvcc"),  # this nvcc ends at 90: PTX serves it
        ("7.5", (), "the GPU (sm_75) is older than sm_80"),
        ("", (), "nvidia-smi shows no GPU"),
    ],
)
def test_unset_archs_are_those_of_the_visible_gpus(
    toolkit: Path, capabilities: str, archs: tuple[int, ...], note: str
) -> None:
    plan = build_plan.make_plan(with_gpu(toolkit, capabilities))
    assert plan.archs == archs
    assert note in plan.note


def test_listed_archs_win_over_the_visible_gpu(toolkit: Path) -> None:
    environ = with_gpu(toolkit, "8.6")
    listed = build_plan.make_plan(environ | {"FLASH_ATTN_CUDA_ARCHS": "90; 80"})
    assert listed.archs == (80, 90)
    assert listed.arch_list == "80;90"
    assert listed.cuda_home == toolkit.parent
    assert build_plan.make_plan(environ | {"FLASH_ATTN_CUDA_ARCHS": ""}).archs == ()


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("8.0", "like \"80;90\"; got '8.0'"),
        ("75", "from 80 on"),
        ("80;90a", "got '90a'"),
        ("80;100", r"this nvcc knows \(80, 86, 90\), got 100"),
    ],
)
def test_wrong_archs_are_refused(toolkit: Path, listed: str, message: str) -> None:
    environ = with_gpu(toolkit, "8.0") | {"FLASH_ATTN_CUDA_ARCHS": listed}
    with pytest.raises(ValueError, match=message):
        build_plan.make_plan(environ)


def test_listed_archs_without_nvcc_are_refused(no_toolkit: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="needs the CUDA compiler nvcc.*FLASH_ATTN_CUDA_ARCHS= "):
        build_plan.make_plan({"PATH": str(tmp_path), "FLASH_ATTN_CUDA_ARCHS": "80"})


def test_every_arch_gets_machine_code_and_the_newest_also_ptx() -> None:
    assert build_plan.gencode(Path("csrc/units/x_sm80.cu"), (80, 90)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_the_sm90_family_is_compiled_for_sm_90a_alone() -> None:
    for source in ("csrc/units/forward_sm90_hdim64.cu", "csrc/sm90/tile_counter.cu"):
        flags = build_plan.gencode(Path(source), (80, 90))
        assert flags == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_builds_without_sm_90_hold_a_stand_in_for_its_family() -> None:
    stand_in, launcher = "csrc/sm90/absent.cpp", "csrc/sm90/backward.cpp"
    unit = "csrc/units/backward_sm90_hdim64.cu"
    for archs in ((90,), (80, 90)):
        found = build_plan.kernel_sources(archs)
        assert {launcher, unit} <= set(found) and stand_in not in found
    found = build_plan.kernel_sources((80,))
    assert [path for path in found if "sm90" in path] == [stand_in]
    assert "csrc/units/forward_sm80_hdim64.cu" in found
    assert build_plan.kernel_sources(()) == []


def test_sources_without_archs_are_plain_cpp() -> None:
    cpu, both = (set(build_plan.sources(archs)) for archs in ((), (80,)))
    assert cpu < both
    assert "csrc/config/select.cpp" in cpu
    assert not any(path.endswith(".cu") or "/cuda_" in path for path in cpu)
    assert "csrc/units/forward_sm80_hdim64.cu" in both
    assert not any(path.startswith("csrc/host/") for path in both)


def test_warnings_fail_the_build_of_developers_only() -> None:
    assert "-Werror" not in build_plan.cxx_flags({})
    assert "-Werror" in build_plan.cxx_flags({"FLASH_ATTN_WERROR": "1"})


def test_the_module_is_told_its_version_and_that_of_cuda(toolkit: Path) -> None:
    cpu = build_plan.module_facts(build_plan.Plan((), None, ""), "2.8.3+1")
    assert cpu == ['-DFLASH_ATTN_VERSION="2.8.3+1"', '-DFLASH_ATTN_CUDA_VERSION=""']
    gpu = build_plan.module_facts(build_plan.Plan((80,), toolkit.parent, ""), "2.8.3+1")
    assert gpu[1] == '-DFLASH_ATTN_CUDA_VERSION="13.0"'


def test_fat_binaries_are_compressed_by_every_toolkit() -> None:
    new, old = (build_plan.nvcc_flags(version) for version in ("13.0", "12.3"))
    assert "--compress-mode=size" in new and "-Xfatbin=-compress-all" in old
    assert len(old) == len(new) and len(set(old) ^ set(new)) == 2
    assert build_plan.nvcc_flags("12.10") == build_plan.nvcc_flags("12.8") == new


def test_a_malformed_kernel_filter_is_refused() -> None:
    macros = dict(build_plan.define_macros((80,), {"FLASH_ATTN_KERNELS": "fwd/sm80,bwd"}))
    assert macros["FLASH_ATTN_KERNELS"] == '"fwd/sm80,bwd"'
    assert macros["FLASH_ATTN_CUDA_ARCHS"] == '"80"'
    with pytest.raises(ValueError, match="FLASH_ATTN_KERNELS: expected comma-separated prefixes"):
        build_plan.define_macros((80,), {"FLASH_ATTN_KERNELS": "fwd/sm80 bwd"})


@pytest.mark.parametrize(
    ("free", "max_jobs", "jobs"),
    [(100.0, "", 8), (10.0, "", 3), (1.0, "", 1), (100.0, "2", 2), (10.0, "6", 3), (None, "", 8)],
)
def test_jobs_follow_cores_memory_and_max_jobs(
    monkeypatch: pytest.MonkeyPatch, free: float | None, max_jobs: str, jobs: int
) -> None:
    monkeypatch.setattr(build_plan.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(build_plan, "free_gib", lambda: free)
    assert build_plan.job_count(cuda=True, environ={"MAX_JOBS": max_jobs}) == jobs


CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPfi' for 'sm_80'
ptxas info    : Function properties for _Z1kPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 250.000 ms
"""
SPILLED = CLEAN.replace("0 bytes spill stores", "20 bytes spill stores")
LOCAL = CLEAN.replace("0 bytes stack frame", "16 bytes stack frame")
WARNED = CLEAN + "ptxas warning : something that costs speed\n"
SERIALISED = CLEAN + "ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized\n"


@pytest.mark.parametrize(
    ("output", "status"),
    [(CLEAN, 0), (SPILLED, 1), (LOCAL, 1), (WARNED, 1), (SERIALISED, 1)],
    ids=["clean", "spill", "local memory", "warning", "C7510"],
)
def test_the_gate_fails_on_spills_and_serialised_wgmma(
    toolkit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    status: int,
) -> None:
    (toolkit / "output").write_text(output)
    monkeypatch.setattr(nvcc_gate, "ROOT", tmp_path)
    made = tmp_path / "unit.o"
    command = [str(toolkit / "nvcc"), "--cuda-archs=80,90", "-c", "unit.cu", "-o", str(made)]
    assert nvcc_gate.main(command) == status
    assert made.exists() == (status == 0), "a rejected object must not be taken by the next build"
    assert ("expected no spills" in capsys.readouterr().out) == (status != 0)
    record = json.loads((tmp_path / "build/ptxas/unit.json").read_text())
    (kernel,) = record["kernels"]
    assert (kernel["arch"], kernel["registers"], kernel["static_smem"]) == ("sm_80", 168, 1024)
    assert kernel["spill_stores"] == (20 if output == SPILLED else 0)
    assert kernel["ptxas_seconds"] == 0.25


def test_the_gate_only_tells_of_spills_on_other_architectures(
    toolkit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (toolkit / "output").write_text(SPILLED.replace("sm_80", "sm_89"))
    monkeypatch.setattr(nvcc_gate, "ROOT", tmp_path)
    made = tmp_path / "unit.o"
    command = [str(toolkit / "nvcc"), "--cuda-archs=89", "-c", "unit.cu", "-o", str(made)]
    assert nvcc_gate.main(command) == 0
    assert made.exists()
    assert "1 kernels" in (said := capsys.readouterr().out) and "1 with spills" in said


def test_a_named_cutlass_folder_without_headers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CUTLASS_INCLUDE_DIR: expected a folder with cutlass"):
        cutlass.find_include_dir({"CUTLASS_INCLUDE_DIR": str(tmp_path)})


def test_cutlass_headers_are_unpacked_from_the_wheel_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "nvidia_cutlass.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("cutlass/version.h", "cute/tensor.hpp"):
            archive.writestr(f"cutlass_library/source/include/{name}", "")
        archive.writestr("cutlass_library/generator.py", "")
    monkeypatch.setattr(cutlass, "from_installed_package", lambda: None)
    cutlass.unpack_headers(wheel, tmp_path / "cache" / "include")
    found = cutlass.find_include_dir({}, cache=tmp_path / "cache")
    assert found == tmp_path / "cache" / "include"
    assert sorted(path.name for path in found.rglob("*.h*")) == ["tensor.hpp", "version.h"]
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_cutlass_that_cannot_be_had_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "python"
    write_script(failing, "#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    monkeypatch.setattr(cutlass, "from_installed_package", lambda: None)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(RuntimeError, match=r"(?s)CUTLASS_INCLUDE_DIR.*no network"):
        cutlass.find_include_dir({}, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("csrc/cpu/a.cpp", "#include <torch/csrc/stable/tensor.h>", "csrc/binding only"),
        ("csrc/arith/a.h", '#include "params.h"', "layer arith may not include params.h"),
        ("csrc/sm80/a.cuh", '#include "binding/check.h"', "layer sm80 may not include binding"),
        ("csrc/new/a.h", "", "has no line in LAYERS"),
        ("csrc/cpu/a.cpp", "  // return a + b;", "commented-out code"),
        ("csrc/cpu/a.cpp", "  // sum += a[i];", "commented-out code"),
        ("csrc/cpu/a.cpp", "// #include <vector>", "commented-out code"),
        ("csrc/cpu/a.cpp", "  // for (int i = 0; i < n; ++i) {", "commented-out code"),
        ("csrc/cpu/a.cpp", '  printf("%d", i);', "no printf"),
        ("csrc/cpu/a.cpp", "  std::abort(); // TO" + "DO", "TO" + "DO"),
        ("csrc/units/a.cu", "\n" * 6, "at most 5 lines"),
        ("flash_attn/a.py", "\n" * 451, "at most 450 lines"),
    ],
)
def test_ratchets_find_breaches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, line: str, message: str
) -> None:
    monkeypatch.setattr(ratchets, "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    found = [text for _, _, text in ratchets.breaches([Path(path)])]
    assert any(message in text for text in found), found


def test_ratchets_let_prose_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ratchets, "ROOT", tmp_path)
    prose = (
        """\
// Rows of one dtype; the first that fits (163 KB on sm_80) is taken.
//   dv = P^T dout;  dS = P * (dP - softmax_d);  dq = softmax_scale dS k,
// if the row has no visible key, out is 0
int x = 0;  // TO"""
        + """DO: widen to int64, no caller needs it yet
char buffer[8] = {};
"""
    )
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "a.cpp").write_text(prose)
    assert list(ratchets.breaches([Path("csrc/cpu/a.cpp")])) == []
