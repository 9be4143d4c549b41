"""House rules that no other linter knows; exit status 1 on any breach."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450
MAX_UNIT_LINES = 5
MAX_UNITS = 30
CPP_SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}
TEXT_SUFFIXES = CPP_SUFFIXES | {".py", ".md", ".toml", ".txt", ".cmake", ""}

# What each folder of csrc/ may include of the others; every folder may include itself.
LAYERS = {
    "arith": set[str](),
    "device": {"arith", "params.h"},
    "config": {"arith", "params.h"},
    "cpu": {"arith", "params.h"},
    "sm80": {"arith", "config", "device", "params.h"},
    "sm90": {"arith", "config", "device", "params.h"},
    "units": {"sm80", "sm90"},
    "host": {"arith", "config", "params.h"},
    "binding": {"arith", "config", "cpu", "sm80", "sm90", "params.h"},
    "params.h": {"arith"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
TORCH_INCLUDE = re.compile(r"^(torch|ATen|c10|pybind11)/")
TODO = re.compile(r"\b(TODO|FIXME|XXX)\b(?!: \S+ \S+)")
PROCESS_KILLERS = re.compile(r"(?<![\w.:])(printf|exit|abort)\s*\(")
KEYWORD = r"(?:if|for|while|switch|return|else|auto|int|float|bool|void|const|constexpr|static)\b"
COMMENTED_CODE = re.compile(
    rf"^\s*//+\s*(?:{KEYWORD}.*(?:;|\{{|\))|#\s*(?:include|define|if|pragma)\b.*"
    r"|[\w.:>\[\]-]+\s*(?:[-+*/|&]?=|\()[^;]*;|\}.*|\{)\s*$"
)

Breach = tuple[Path, int, str]


def tracked_files() -> list[Path]:
    """Files of the repository, also those not yet added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return sorted(
        path for path in paths if path.suffix in TEXT_SUFFIXES and (ROOT / path).is_file()
    )


def layer_of(path: Path) -> str | None:
    """Folder under csrc/, or the file's name right in it; None outside csrc/."""
    return path.parts[1] if path.parts[0] == "csrc" else None


def check_length(path: Path, lines: list[str]) -> Iterator[Breach]:
    limit = MAX_UNIT_LINES if layer_of(path) == "units" else MAX_LINES
    if len(lines) > limit:
        yield path, len(lines), f"expected at most {limit} lines, got {len(lines)}: split the file"


def check_todo(path: Path, lines: list[str]) -> Iterator[Breach]:
    for number, line in enumerate(lines, 1):
        if TODO.search(line) and path.suffix != ".md" and path.name != "ratchets.py":
            yield path, number, 'expected "TODO: what, and why it can wait"'


def check_includes(path: Path, lines: list[str]) -> Iterator[Breach]:
    layer = layer_of(path)
    if layer is None:
        return
    if layer not in LAYERS:
        yield path, 1, f"csrc/{layer} has no line in LAYERS of tools/ratchets.py: add one"
        return
    for number, line in enumerate(lines, 1):
        include = INCLUDE.match(line)
        if include is None:
            continue
        bracket, name = include.groups()
        if bracket == "<":
            owner = "host" if name.startswith("pybind11/") else "binding"
            if TORCH_INCLUDE.match(name) and layer != owner:
                yield path, number, f"<{name}> may be included in csrc/{owner} only"
        elif (other := Path(name).parts[0]) not in LAYERS[layer] | {layer}:
            yield path, number, f"layer {layer} may not include {other} (CONTRIBUTING.md, layers)"


def check_cpp(path: Path, lines: list[str]) -> Iterator[Breach]:
    if path.suffix not in CPP_SUFFIXES:
        return
    for number, line in enumerate(lines, 1):
        if COMMENTED_CODE.match(line):
            yield path, number, "commented-out code: delete it"
        if PROCESS_KILLERS.search(line.partition("//")[0]):
            yield path, number, "no printf, exit or abort: throw, so that Python sees the error"


def check_units(paths: Iterable[Path]) -> Iterator[Breach]:
    units = [path for path in paths if layer_of(path) == "units"]
    if len(units) > MAX_UNITS:
        yield units[-1], 1, f"expected at most {MAX_UNITS} units, got {len(units)}"


def check_arith_compiles(paths: Iterable[Path]) -> Iterator[Breach]:
    """arith/ and params.h are plain C++: no torch, no CUDA, no warnings."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        yield Path("csrc/arith"), 1, "needs g++ to check that arith/ is plain C++: install it"
        return
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-Icsrc", "-x", "c++"]
    for path in paths:
        if layer_of(path) in {"arith", "params.h"}:
            program = f'#include "{path.relative_to("csrc")}"\n'
            command = [compiler, *flags, "-"]
            done = subprocess.run(command, cwd=ROOT, input=program, capture_output=True, text=True)
            if done.returncode != 0:
                yield path, 1, f"does not compile with plain g++:\n{done.stderr}"


def breaches(paths: list[Path]) -> Iterator[Breach]:
    for path in paths:
        lines = (ROOT / path).read_text().splitlines()
        for check in (check_length, check_todo, check_includes, check_cpp):
            yield from check(path, lines)
    yield from check_units(paths)
    yield from check_arith_compiles(paths)


def main() -> int:
    paths = tracked_files()
    found = list(breaches(paths))
    for path, number, message in found:
        print(f"{path}:{number}: {message}")
    print(f"ratchets: {len(paths)} files, {len(found)} breaches")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
