"""Says what a fresh machine lacks before anything is installed; exit status 1 if something does."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> "list[tuple[str, str]]":
    """What is missing, and the Debian or Ubuntu package that has it."""
    found = []
    if importlib.util.find_spec("ensurepip") is None:
        found.append(("Python's venv module with pip", "python3-venv"))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(("Python.h, which the test module includes", "python3-dev"))
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        found.append(("a C++20 compiler (c++, or the one named by CXX)", "g++"))
    return found


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  # this script's job is to say so
        print("expected Python 3.10 or newer, got", sys.version.split()[0])
        print("name one that is: make PYTHON=python3.12 ...")
        return 1
    found = missing()
    for what, _ in found:
        print("missing:", what)
    if found:
        packages = " ".join(package for _, package in found)
        print("on Debian or Ubuntu: sudo apt-get install " + packages)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
