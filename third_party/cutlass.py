"""Finds the CUTLASS headers, or fetches them: `python third_party/cutlass.py` prints their folder.

They come from the PyPI package nvidia-cutlass; nothing else of it is installed or imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

REQUIREMENT = "nvidia-cutlass==4.2.0.0"
INCLUDE_IN_PACKAGE = "source/include"
CACHE = Path(__file__).resolve().parent / "cutlass"  # ignored by git


def has_headers(include: Path) -> bool:
    return (include / "cutlass" / "version.h").exists() and (include / "cute").is_dir()


def from_environment(environ: Mapping[str, str]) -> Path | None:
    named = environ.get("CUTLASS_INCLUDE_DIR")
    if not named:
        return None
    if not has_headers(Path(named)):
        raise RuntimeError(
            f"CUTLASS_INCLUDE_DIR: expected a folder with cutlass/version.h and cute/; "
            f"got {named!r}"
        )
    return Path(named)


def from_installed_package() -> Path | None:
    # find_spec of a top-level package doesn't run it: its own dependencies need not be there.
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        include = Path(folder, INCLUDE_IN_PACKAGE)
        if has_headers(include):
            return include
    return None


def unpack_headers(wheel: Path, target: Path) -> None:
    """Copies the include folder of the package's wheel to `target`, whole or not at all."""
    prefix = f"cutlass_library/{INCLUDE_IN_PACKAGE}/"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
        zipfile.ZipFile(wheel) as archive,
    ):
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(prefix)])
        shutil.rmtree(target, ignore_errors=True)
        Path(folder, prefix).rename(target)


def download(target: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--dest", folder, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise RuntimeError(
                f"The CUDA kernels need the CUTLASS headers of {REQUIREMENT}; pip could not "
                f"download them. Install it (pip install --no-deps {REQUIREMENT}), or set "
                f"CUTLASS_INCLUDE_DIR to the include folder of a CUTLASS 4.2 checkout, or set "
                f"FLASH_ATTN_CUDA_ARCHS= (empty) for the CPU backend alone. "
                f"pip said:\n{done.stderr}"
            )
        unpack_headers(wheels[0], target)
    return target


def find_include_dir(environ: Mapping[str, str] = os.environ, cache: Path = CACHE) -> Path:
    """Folder to pass to the compiler: named, installed, cached from before, or downloaded now."""
    include = cache / "include"
    return (
        from_environment(environ)
        or from_installed_package()
        or (include if has_headers(include) else download(include))
    )


if __name__ == "__main__":
    print(find_include_dir())
