"""Installs every wheel of dist/ as its users would, and uses it: `make test-wheels`.

Each Python found here gets an environment with one of the supported torch releases in turn: the
oldest, the one after it, the newest that pip finds; the Python that runs this gets the torch that
is installed here, in CI a build for CPUs. Then tests/smoke.py, beside a flash-attn-4 too. No
compiler can be called. Prints a table; exit status 1 if anything failed, or took longer than
LIMIT_SECONDS from `pip install` to the end of the first training step.

The environments stay in build/wheel-envs, several GB each where pip finds only torch with CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "wheel-envs"
OLDEST_PYTHON = (3, 10)
TORCHES = ("torch==2.10.*", "torch==2.11.*", "torch")  # ascending
LIMIT_SECONDS = 30.0
# What flash-attn-4 puts beside this package: a subpackage, and no flash_attn/__init__.py.
NEIGHBOUR = "flash_attn_4-4.0-py3-none-any.whl"
IMPORTS = (
    "import flash_attn.cute, flash_attn, importlib.metadata as m; "
    "assert flash_attn.cute.NAME == 'stand-in' and flash_attn.flash_attn_func; "
    "names = set(m.packages_distributions()['flash_attn']); "
    "assert names == {'flash-attn', 'flash-attn-4'}, names"
)


class Failed(Exception):
    """A command that should have worked, with its output."""


@dataclass(frozen=True)
class Row:
    wheel: str
    python: str
    torch: str
    seconds: float | None  # to the end of the first training step
    failure: str

    @property
    def ok(self) -> bool:
        return not self.failure


def run(command: Sequence[object], **variables: str) -> str:
    """Output of a command that runs outside of the repository, where compiling fails."""
    environ = os.environ | {"CC": "false", "CXX": "false", "PYTHONPATH": ""} | variables
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=ENVIRONMENTS,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(words)}\n{done.stdout}")
    return done.stdout


def python_version(python: Path) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
    found = re.fullmatch(r"(\d+) (\d+)\s*", asked.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_pythons() -> list[Path]:
    """One interpreter of each supported minor version: on PATH, or of pyenv."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders += sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin"))
    found = {python_version(Path(sys.executable)): Path(sys.executable)}
    for folder in folders:
        for python in sorted(folder.glob("python3.[0-9]*")):
            if re.fullmatch(r"python3\.\d+", python.name):
                found.setdefault(python_version(python), python)
    return [found[number] for number in sorted(found) if number >= OLDEST_PYTHON]


def pair(pythons: Sequence[Path], torches: Sequence[str]) -> list[tuple[Path, str]]:
    """Every Python and every torch at least once, old beside old."""
    pairs = [(Path(sys.executable), f"torch=={version('torch')}")]
    others = [python for python in pythons if python != Path(sys.executable)] or [*pythons]
    count = max(len(others), len(torches))
    cycles = zip(itertools.cycle(others), itertools.cycle(torches), strict=False)
    return [*pairs, *itertools.islice(cycles, count)]


def make_environment(python: Path, torch: str) -> Path:
    """Interpreter of an environment with this torch, from before or made now."""
    minor = ".".join(map(str, python_version(python)))
    folder = ENVIRONMENTS / f"python{minor}-{re.sub(r'[^a-z0-9.+]', '', torch)}"
    ready = folder / ".ready"
    interpreter = folder / "bin" / "python"
    if not ready.exists():
        print(f"Creating {folder.relative_to(ROOT)} with {torch} ...", flush=True)
        run([python, "-m", "venv", "--clear", folder])
        run([interpreter, "-m", "pip", "install", "--quiet", torch])
        ready.touch()
    return interpreter


def make_neighbour() -> Path:
    """A wheel that has flash-attn-4's name and place."""
    path = ENVIRONMENTS / NEIGHBOUR
    info = "flash_attn_4-4.0.dist-info"
    files = {
        "flash_attn/cute/__init__.py": "NAME = 'stand-in'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": "flash_attn\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def smoke(interpreter: Path) -> float:
    """Runs tests/smoke.py; seconds to its first training step."""
    said = run([interpreter, ROOT / "tests" / "smoke.py"])
    found = re.search(r"first training step after ([\d.]+) s", said)
    if found is None:
        raise Failed(f"tests/smoke.py: expected the time of its training step, got\n{said}")
    return float(found[1])


def check_neighbour(interpreter: Path, wheel: Path) -> None:
    """flash-attn-4 may come first or last, and go; this package stays whole."""
    pip = [interpreter, "-m", "pip"]
    neighbour = make_neighbour()
    run([*pip, "install", "--no-deps", neighbour])
    run([interpreter, "-c", IMPORTS])
    run([*pip, "install", "--no-deps", "--force-reinstall", wheel])
    run([interpreter, "-c", IMPORTS])
    run([*pip, "uninstall", "--yes", "flash-attn-4"])
    run([interpreter, "-c", "import flash_attn; assert flash_attn.flash_attn_func"])


def try_wheel(wheel: Path, python: Path, torch: str) -> Row:
    number = ".".join(map(str, python_version(python)))
    seconds = None
    failure = ""
    try:
        interpreter = make_environment(python, torch)
        pip = [interpreter, "-m", "pip"]
        torch = run([interpreter, "-c", "import torch; print(torch.__version__)"]).split()[-1]
        run([*pip, "uninstall", "--yes", "flash-attn", "flash-attn-4"])
        begin = time.monotonic()
        run([*pip, "install", wheel])
        seconds = time.monotonic() - begin + smoke(interpreter)
        check_neighbour(interpreter, wheel)
        if seconds > LIMIT_SECONDS:
            failure = f"expected at most {LIMIT_SECONDS:.0f} s to the first training step"
    except Failed as error:
        failure = str(error)
    return Row(wheel.name, number, torch, seconds, failure)


def print_table(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.failure:
            print(f"\n{row.wheel}, Python {row.python}, {row.torch}: {row.failure}")
    print("\n| wheel | Python | torch | s to the first training step | |")
    print("|---|---|---|---|---|")
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        verdict = "works" if row.ok else "FAILED"
        print(f"| {row.wheel} | {row.python} | {row.torch} | {seconds} | {verdict} |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", nargs="*", type=Path, help="unless named, those of dist/")
    parser.add_argument("--torch", action="append", help=f"requirements; unless named {TORCHES}")
    parser.add_argument("--here", action="store_true", help="only this Python and its torch")
    options = parser.parse_args(arguments)
    wheels = [path.resolve() for path in options.wheels] or sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        print("expected wheels in dist/, found none: `make wheel` builds one")
        return 1
    pairs = pair(find_pythons(), options.torch or TORCHES)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    rows = [
        try_wheel(wheel, python, torch)
        for python, torch in (pairs[:1] if options.here else pairs)
        for wheel in wheels
    ]
    print_table(rows)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
