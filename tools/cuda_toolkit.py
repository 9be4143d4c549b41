"""Sets up a CUDA toolkit from PyPI packages: `python tools/cuda_toolkit.py 13.0` prints its folder.

NVIDIA publishes the whole compiler there from CUDA 13.0 on. The packages are pinned for every
toolkit, so that a wheel can be built again. Older toolkits come from NVIDIA's installers; CUDA_HOME
names their folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / "build" / "toolkits"
# nvcc, ptxas and fatbinary; cicc; their headers; the runtime with libcudart_static.a; <cuda/std/*>.
PACKAGES = (
    *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"),
    *("nvidia-cuda-runtime", "nvidia-cuda-cccl"),
)
# Versions of PACKAGES, in their order.
TOOLKITS = {
    "13.0": ("13.0.88", "13.0.88", "13.0.88", "13.0.96", "13.0.85"),
    "13.2": ("13.2.86", "13.2.86", "13.2.86", "13.2.86", "13.2.86"),
    "13.5": ("13.5.37", "13.5.37", "13.5.37", "13.5.37", "13.3.5.0.6"),
}
ANY = "13.x"
# The newest whose kernels pass the compile gate. On sm_90 those of 13.3 and 13.4 spill in the
# forward of head dim 96, those of 13.5 also in the backward of 96 to 256.
NEWEST = "13.2"
PARTS = ("bin/nvcc", "nvvm/bin/cicc", "include/cuda_runtime.h", "lib64/libcudart_static.a")


def release_of(name: str) -> str:
    """The toolkit that is meant: a release of TOOLKITS, or "13.x" for NEWEST."""
    release = NEWEST if name == ANY else name
    if release not in TOOLKITS:
        raise ValueError(
            f"CUDA: expected one of {', '.join(TOOLKITS)} or {ANY} ({NEWEST}), got "
            f"{name!r}. For another toolkit set CUDA_HOME to its folder instead"
        )
    return release


def requirements(release: str) -> list[str]:
    versions = zip(PACKAGES, TOOLKITS[release], strict=True)
    return [f"{package}=={version}" for package, version in versions]


def install(release: str, target: Path) -> None:
    """Puts the toolkit into `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--target", folder, *requirements(release)]
        done = subprocess.run(command, capture_output=True, text=True)
        home = next(Path(folder, "nvidia").glob("cu[0-9]*"), Path(folder))
        if (home / "lib").is_dir():
            (home / "lib64").symlink_to("lib")
        missing = [part for part in PARTS if not (home / part).exists()]
        if done.returncode != 0 or missing:
            raise RuntimeError(
                f"CUDA {release}: expected {', '.join(PARTS)} from "
                f"{' '.join(requirements(release))}, missing: {', '.join(missing)}. Set CUDA_HOME "
                f"to a toolkit of this machine instead. pip said:\n{done.stderr}"
            )
        shutil.rmtree(target, ignore_errors=True)
        home.rename(target)


def find(name: str, cache: Path = CACHE) -> Path:
    """Folder of the toolkit, for CUDA_HOME: from before, or installed now."""
    release = release_of(name)
    target = cache / release
    if not all((target / part).exists() for part in PARTS):
        print(f"CUDA {release}: installing the compiler into {target} ...", file=sys.stderr)
        install(release, target)
    return target


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(find(arguments[0]))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
