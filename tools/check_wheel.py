"""Checks that a wheel keeps its promises: `python tools/check_wheel.py dist/*.whl`.

Tag, size, metadata, and what the module asks of the machine, from its dynamic symbols. Exit status
1 and one sentence for each thing that isn't so. (auditwheel knows only wheels that bring all their
libraries along; ours uses torch's.)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import build_plan, old_glibc, wheel_plan

MODULE = "flash_attn/_C.abi3.so"
TOP_LEVEL = {"flash_attn", "flash_attn_2_cuda"}
# Newest versions in manylinux_2_28, of the symbols that compilers and the C library define.
NEWEST = {
    "GLIBC": old_glibc.OLDEST,
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
}
# libtorch.so stands for whatever libraries the installed torch consists of.
LIBRARIES = re.compile(
    r"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so[.\d]*|ld-linux-[\w-]+\.so[.\d]*"
)
PYTHON_SYMBOLS = {"PyModule_Create2"}  # in the limited API since Python 3.2
VERSION = re.compile(r"\(?([A-Z]+)_([\d.]+)\)?")
# Torch's C++ interface changes from release to release, its C interface doesn't.
TORCH_CPP = re.compile(r"_ZNK?(2at|3c10|5torch)")


def undefined_symbols(dynamic_symbols: str) -> list[tuple[str, str]]:
    """(name, version or "") of what an `objdump -T` shows as undefined."""
    lines = (line.split() for line in dynamic_symbols.splitlines() if "*UND*" in line)
    return [(words[-1], words[-2] if "(" in words[-2] else "") for words in lines]


def symbol_breaches(dynamic_symbols: str) -> Iterator[str]:
    for name, version in undefined_symbols(dynamic_symbols):
        wanted = VERSION.fullmatch(version)
        if wanted and old_glibc.parse_version(wanted[2]) > NEWEST.get(wanted[1], (0,)):
            newest = NEWEST.get(wanted[1])
            upto = ".".join(map(str, newest)) if newest else "none"
            yield (
                f"{MODULE} needs {name} of {wanted[1]}_{wanted[2]}; {wheel_plan.PLATFORM} has "
                f"{wanted[1]} up to {upto}. Build on an older system, or find what calls it"
            )
        if TORCH_CPP.match(name):
            yield f"{MODULE} needs {name}, of torch's C++ interface; expected its stable ABI only"
        if re.match(r"_?Py[A-Z_]", name) and name not in PYTHON_SYMBOLS:
            yield f"{MODULE} needs {name} of Python; expected {', '.join(PYTHON_SYMBOLS)} only"


def library_breaches(headers: str) -> Iterator[str]:
    """What an `objdump -p` says of the libraries that the module loads."""
    for kind, value in re.findall(r"^\s+(NEEDED|RPATH|RUNPATH)\s+(\S+)$", headers, re.MULTILINE):
        if kind != "NEEDED":
            yield f"{MODULE} has {kind} {value}: a path of the machine that built it"
        elif not LIBRARIES.fullmatch(value):
            yield f"{MODULE} needs {value}, which not every machine with torch has"


def metadata_breaches(dist_info: str, wheel: zipfile.ZipFile) -> Iterator[str]:
    metadata = Parser().parsestr(wheel.read(f"{dist_info}/METADATA").decode())
    name = metadata["Name"]
    if name.replace("_", "-") != "flash-attn":
        yield f"METADATA: expected the name flash-attn, which programs ask for, got {name}"
    version = metadata["Version"]
    if not version.startswith(f"{wheel_plan.source_version()}."):
        yield f"METADATA: expected version {wheel_plan.source_version()} and a label, got {version}"
    stated = wheel_plan.VERSION_LINE.search(wheel.read("flash_attn/version.py").decode())
    if stated is None or stated[1] != version:
        got = stated and stated[1]
        yield f"flash_attn/version.py: expected {version} as in METADATA, got {got}"
    required = [name for name in metadata.get_all("Requires-Dist", []) if "extra ==" not in name]
    oldest = "torch>={}.{}".format(*build_plan.OLDEST_TORCH)
    if required != [oldest]:
        yield f"METADATA: expected {oldest} as the one requirement, got {required}"
    top_level = set(wheel.read(f"{dist_info}/top_level.txt").decode().split())
    if top_level != TOP_LEVEL:
        yield f"top_level.txt: expected {sorted(TOP_LEVEL)}, got {sorted(top_level)}"


def content_breaches(names: list[str]) -> Iterator[str]:
    libraries = [name for name in names if ".so" in Path(name).suffixes]
    if libraries != [MODULE]:
        yield f"expected {MODULE} as the one library, got {libraries}"
    foreign = [name for name in names if name.startswith("flash_attn/cute/")]
    if foreign:
        yield f"expected no flash_attn/cute, which belongs to flash-attn-4, got {foreign[0]}"
    for name in ("flash_attn/__init__.py", "flash_attn/py.typed", "flash_attn_2_cuda.py"):
        if name not in names:
            yield f"{name} is missing"


def name_breaches(path: Path) -> Iterator[str]:
    tag = f"{wheel_plan.PYTHON_TAG}-{wheel_plan.ABI_TAG}-{wheel_plan.platform_tag()}"
    if not path.name.endswith(f"-{tag}.whl"):
        yield f"expected the tag {tag}: `make wheel` builds such a wheel"
    megabytes = path.stat().st_size / 1e6
    if megabytes > wheel_plan.MAX_MEGABYTES:
        yield f"expected at most {wheel_plan.MAX_MEGABYTES} MB, got {megabytes:.1f}"


def objdump(option: str, file: Path) -> str:
    return subprocess.run(
        ["objdump", option, str(file)], capture_output=True, text=True, check=True
    ).stdout


def breaches(path: Path) -> Iterator[str]:
    yield from name_breaches(path)
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = wheel.namelist()
        yield from content_breaches(names)
        (dist_info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        for needed in ("METADATA", "top_level.txt"):
            if f"{dist_info}/{needed}" not in names:
                yield f"{dist_info}/{needed} is missing"
                return
        yield from metadata_breaches(dist_info, wheel)
        if MODULE in names:
            module = Path(wheel.extract(MODULE, folder))
            yield from symbol_breaches(objdump("-T", module))
            yield from library_breaches(objdump("-p", module))


def main(arguments: list[str]) -> int:
    if not arguments:
        print("expected wheels to check, got none: `make wheel` puts them into dist/")
        return 1
    failed = False
    for path in map(Path, arguments):
        found = list(breaches(path))
        failed = failed or bool(found)
        megabytes = path.stat().st_size / 1e6
        print(f"{path.name}: {megabytes:.1f} MB, {'FAILED' if found else 'keeps its promises'}")
        for sentence in found:
            print(f"  {sentence}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
