"""Installs from source as users do, and uses what comes out: a part of `make test-wheels`.

The source distribution and a clone, with and without build isolation, and editable. The CPU backend
alone, in the environment that tools/test_wheels.py makes for this Python and its torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import test_wheels
from tools.build_plan import ROOT
from tools.test_wheels import ENVIRONMENTS, IMPORTS, Failed, Row, run

SOURCES = ENVIRONMENTS / "sources"
NOT_IN_SDIST = {".gitignore"}
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja", "packaging")  # beside torch
WAYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sdist", ()),
    ("sdist", ("--no-build-isolation",)),
    ("clone", ()),
    ("clone", ("--no-build-isolation",)),
    ("clone", ("--editable",)),
    ("clone", ("--no-build-isolation", "--editable")),
)


def tracked_files() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def make_sdist() -> Path:
    """The archive, which has to hold what a clone holds."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(SOURCES)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = SOURCES.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {member.name.partition("/")[2] for member in files if member.isfile()}
    missing = tracked_files() - held - NOT_IN_SDIST
    if missing:
        raise Failed(f"the sdist lacks {', '.join(sorted(missing))}: name them in MANIFEST.in")
    return archive


def make_clone() -> Path:
    folder = SOURCES / "clone"
    for name in tracked_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def environment_variables() -> dict[str, str]:
    """For a build of the CPU backend with the torch of here, also in pip's isolated environment."""
    constraints = SOURCES / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    named = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(constraints))
    compilers = {"CC": os.environ.get("CC", "cc"), "CXX": os.environ.get("CXX", "c++")}
    return named | compilers | {"FLASH_ATTN_CUDA_ARCHS": ""}


def check_neighbour(interpreter: Path) -> None:
    """flash-attn-4's folder in site-packages doesn't hide an editable install."""
    pip = [interpreter, "-m", "pip"]
    run([*pip, "install", "--no-deps", test_wheels.make_neighbour()])
    try:
        run([interpreter, "-c", IMPORTS])
    finally:
        run([*pip, "uninstall", "--yes", "flash-attn-4"])


def try_way(interpreter: Path, source: Path, options: tuple[str, ...]) -> tuple[float, str]:
    """Seconds to the first training step, and why it failed."""
    pip = [interpreter, "-m", "pip"]
    try:
        run([*pip, "uninstall", "--yes", "flash-attn", "flash-attn-4"])
        begin = time.monotonic()
        run([*pip, "install", *options, source], **environment_variables())
        seconds = time.monotonic() - begin + test_wheels.smoke(interpreter)
        check_neighbour(interpreter)
    except Failed as error:
        return 0.0, str(error)
    return seconds, ""


def main() -> int:
    shutil.rmtree(SOURCES, ignore_errors=True)
    SOURCES.mkdir(parents=True)
    torch = f"torch=={version('torch')}"
    python = Path(sys.executable)
    interpreter = test_wheels.make_environment(python, torch)
    run([interpreter, "-m", "pip", "install", "--quiet", *BUILD_TOOLS])
    sources = {"sdist": make_sdist(), "clone": make_clone()}
    number = ".".join(map(str, sys.version_info[:2]))
    rows = []
    for name, options in WAYS:
        seconds, failure = try_way(interpreter, sources[name], options)
        rows.append(Row(" ".join((name, *options)), number, version("torch"), seconds, failure))
    test_wheels.print_table(rows)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
