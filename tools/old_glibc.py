"""Links a module so that it loads beside an older glibc than that of the machine that builds it.

glibc keeps the old versions of its symbols, but a linker binds to the newest: dlopen@GLIBC_2.34
where dlopen@GLIBC_2.2.5 does as well. The libraries made here stand before glibc's on the linker's
command line. They bear its name, hold no code, and define each symbol that has become newer than
OLDEST with the last version up to OLDEST. Only what is new in glibc itself is left, and
tools/check_wheel.py fails on that.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

OLDEST = (2, 28)  # of manylinux_2_28: the oldest glibc that torch's own wheels load beside
LIBRARIES = ("libc.so.6", "libm.so.6")
# Before glibc 2.34 these were libraries of their own, so a module has to name them.
ONCE_SEPARATE = ("libpthread.so.0", "libdl.so.2", "librt.so.1")

# objdump -T puts versions that a linker doesn't take by itself in parentheses.
SYMBOL = re.compile(r"(\()?GLIBC_([\d.]+)\)?\s+(?:\.hidden )?(\w+)$", re.M)

# libstdc++ reads this flag of glibc 2.32 to save atomic instructions. Ours says "several threads".
SINGLE_THREADED = """\
.section .note.GNU-stack, "", %progbits
.bss
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded, %object
.size __libc_single_threaded, 1
__libc_single_threaded: .zero 1
"""

Version = tuple[int, ...]


def parse_version(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def older_versions(symbols: str, oldest: Version = OLDEST) -> dict[str, str]:
    """Symbol to version, for those of an `objdump -T` whose default is newer than `oldest`."""
    newer: set[str] = set()
    older: dict[str, str] = {}
    for hidden, version, name in SYMBOL.findall(symbols):
        if parse_version(version) > oldest:
            newer |= set() if hidden else {name}
        elif name not in older or parse_version(older[name]) < parse_version(version):
            older[name] = version
    return {name: older[name] for name in sorted(newer & older.keys())}


def version_script(versions: dict[str, str]) -> str:
    nodes = sorted(set(versions.values()), key=parse_version)
    lines = []
    for node in nodes:
        names = " ".join(f"{name};" for name, version in versions.items() if version == node)
        lines.append(f"GLIBC_{node} {{ global: {names} }};")
    return "\n".join(lines) + "\n"


def assembly(versions: dict[str, str]) -> str:
    lines = ['.section .note.GNU-stack, "", %progbits', ".text"]
    for name in versions:
        lines += [f".globl {name}", f".type {name}, %function", f"{name}:"]
    return "\n".join(lines) + "\n"


def run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def make_library(name: str, folder: Path, compiler: str) -> Path:
    path = run([compiler, f"-print-file-name={name}"]).strip()
    versions = older_versions(run(["objdump", "-T", path]))
    source, script = folder / f"{name}.s", folder / f"{name}.map"
    source.write_text(assembly(versions))
    script.write_text(version_script(versions))
    library = folder / name
    command = [compiler, "-shared", "-nostdlib", f"-Wl,-soname,{name}"]
    run([*command, f"-Wl,--version-script={script}", str(source), "-o", str(library)])
    return library


def link_inputs(folder: Path, compiler: str = "cc") -> list[str]:
    """Files to link before all libraries. Made anew each time: they take a fraction of a second."""
    folder.mkdir(parents=True, exist_ok=True)
    source, flag = folder / "single_threaded.s", folder / "single_threaded.o"
    source.write_text(SINGLE_THREADED)
    run([compiler, "-c", str(source), "-o", str(flag)])
    return [str(flag), *(str(make_library(name, folder, compiler)) for name in LIBRARIES)]


def link_args() -> list[str]:
    return ["-Wl,--no-as-needed", *(f"-l:{name}" for name in ONCE_SEPARATE)]
