"""What a build compiles: CUDA architectures, sources, compiler flags, parallel jobs.

Used by setup.py, CMakeLists.txt and the nvcc gate. Standard library only: it runs before torch is
installed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 10)  # the module's stable ABI: TORCH_TARGET_VERSION
OLDEST_ARCH = 80  # Ampere: cp.async and bf16 mma.sync
WHEEL_ARCHS = (80, 90)  # what wheels and CI compile, and where no kernel may spill
USUAL_CUDA_HOME = Path("/usr/local/cuda")
GIB_PER_JOB = 3.0  # peak memory of one nvcc job


@dataclass(frozen=True)
class Plan:
    """The CUDA half of a build; without architectures it is the CPU backend alone."""

    archs: tuple[int, ...]
    cuda_home: Path | None
    note: str  # one line for the user

    @property
    def arch_list(self) -> str:
        return ";".join(map(str, self.archs))


def check_machine(environ: Mapping[str, str] = os.environ, system: str = platform.system()) -> None:
    """Raises where the module can't be compiled at all, with what to do instead."""
    if system != "Linux":
        raise RuntimeError(
            f"expected Linux, got {system}: flash-attn is built and tested on Linux alone. Use a "
            f"Linux machine or container, on Windows also WSL2; programs that treat flash-attn as "
            f"optional work without it."
        )
    compiler = environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0], path=environ.get("PATH")) is None:
        raise RuntimeError(
            f"expected a C++20 compiler ({compiler}, chosen by CXX), found none. Install one (on "
            f"Debian or Ubuntu: apt-get install g++), or install a wheel of flash-attn, which "
            f"needs no compiler."
        )


def check_torch(version: str) -> None:
    """Raises if torch is older than what the module is written for."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TORCH:
        oldest = "{}.{}".format(*OLDEST_TORCH)
        raise RuntimeError(
            f"expected torch {oldest} or later, found {version}: pip install 'torch>={oldest}', or "
            f"leave out --no-build-isolation and pip fetches one to build with."
        )


def find_cuda_home(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Folder of the CUDA toolkit: CUDA_HOME, CUDA_PATH, nvcc on PATH, else its usual place."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = environ.get(name)
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home)
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is None:
        return USUAL_CUDA_HOME if (USUAL_CUDA_HOME / "bin" / "nvcc").exists() else None
    # An nvcc on PATH may be a script that starts the real one: ask it where it runs from.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    here = re.search(r"_HERE_=(.+)", dry_run.stderr + dry_run.stdout)
    return Path(here.group(1).strip() if here else Path(nvcc).resolve().parent).parent


def nvcc_version(cuda_home: Path) -> str:
    """Release of the toolkit, "13.0"."""
    command = [str(cuda_home / "bin" / "nvcc"), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    if release is None:
        raise RuntimeError(f"expected 'release X.Y' from {command[0]} --version, got: {text}")
    return release.group(1)


def nvcc_archs(cuda_home: Path) -> tuple[int, ...]:
    """Architectures that this nvcc compiles for."""
    command = [str(cuda_home / "bin" / "nvcc"), "--list-gpu-arch"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(sorted(int(arch) for arch in re.findall(r"compute_(\d+)$", text, re.MULTILINE)))


def visible_archs(environ: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Architectures of the GPUs that nvidia-smi lists, () without GPU or driver."""
    nvidia_smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if nvidia_smi is None:
        return ()
    command = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode != 0:
        return ()
    found = re.findall(r"^(\d+)\.(\d)\s*$", listed.stdout, re.MULTILINE)
    return tuple(sorted({int(major + minor) for major, minor in found}))


def parse_archs(text: str) -> tuple[int, ...]:
    """Architectures of a list like "80;90", in order and each once."""
    parts = [part.strip() for part in re.split(r"[;,\s]+", text) if part.strip()]
    for part in parts:
        if not part.isdigit() or int(part) < OLDEST_ARCH:
            raise ValueError(
                f"FLASH_ATTN_CUDA_ARCHS: expected compute capabilities without the dot, from "
                f'{OLDEST_ARCH} on, separated by ";", like "80;90"; got {part!r} in {text!r}'
            )
    return tuple(sorted({int(part) for part in parts}))


def make_plan(environ: Mapping[str, str] = os.environ) -> Plan:
    """Architectures to build: FLASH_ATTN_CUDA_ARCHS; unset, those of the visible GPUs."""
    listed = environ.get("FLASH_ATTN_CUDA_ARCHS")
    archs = parse_archs(listed) if listed is not None else ()
    if listed is not None and not archs:
        return Plan((), None, "CPU backend only: FLASH_ATTN_CUDA_ARCHS is set and empty.")
    cuda_home = find_cuda_home(environ)
    if listed is None:
        found = visible_archs(environ)
        archs = tuple(arch for arch in found if arch >= OLDEST_ARCH)
        missing = why_no_gpu_backend(cuda_home, found, archs)
        if missing:
            return Plan((), None, missing)
    if cuda_home is None:
        raise RuntimeError(
            f"FLASH_ATTN_CUDA_ARCHS={listed!r} needs the CUDA compiler nvcc: expected it on PATH "
            f"or in CUDA_HOME/bin, found none. Install a CUDA toolkit, or set "
            f"FLASH_ATTN_CUDA_ARCHS= (empty) for the CPU backend alone."
        )
    archs = buildable_archs(archs, nvcc_archs(cuda_home), explicit=listed is not None)
    arch_list = ";".join(map(str, archs))
    note = f"CPU and CUDA backends for architectures {arch_list} with nvcc in {cuda_home}."
    return Plan(archs, cuda_home, note)


def why_no_gpu_backend(
    cuda_home: Path | None, found: tuple[int, ...], usable: tuple[int, ...]
) -> str:
    """One line on what the GPU backends lack; empty if they can be built."""
    remedy = 'set FLASH_ATTN_CUDA_ARCHS="80;90" to build the GPU backends for other machines'
    if cuda_home is None:
        return (
            "CPU backend only: no CUDA compiler (nvcc on PATH or in CUDA_HOME/bin). For the GPU "
            "backends install a CUDA toolkit; without a GPU in this machine also " + remedy + "."
        )
    if not found:
        return f"CPU backend only: nvidia-smi shows no GPU; {remedy}."
    if not usable:
        return (
            f"CPU backend only: the GPU (sm_{found[-1]}) is older than sm_{OLDEST_ARCH}; {remedy}."
        )
    return ""


def buildable_archs(
    archs: tuple[int, ...], supported: tuple[int, ...], explicit: bool
) -> tuple[int, ...]:
    """Checks archs against nvcc; a visible GPU newer than nvcc gets the newest PTX instead."""
    unknown = [arch for arch in archs if arch not in supported]
    if explicit and unknown:
        raise ValueError(
            f"FLASH_ATTN_CUDA_ARCHS: expected architectures that this nvcc knows "
            f"({', '.join(map(str, supported))}), got {unknown[0]}. Use a newer CUDA toolkit, or "
            f"leave it out: newer GPUs run the PTX of the newest architecture listed."
        )
    clamped = {max(known for known in supported if known <= arch) for arch in archs}
    return tuple(sorted(clamped))


def gencode(source: Path, archs: Sequence[int]) -> list[str]:
    """nvcc's architecture flags for one source file.

    Machine code for every architecture, and PTX of the newest for GPUs that come after it. The sm90
    family uses instructions that only sm_90a has, of which there is no PTX for later GPUs.
    """
    if source.suffix != ".cu":
        raise ValueError(f"expected a .cu file, got {source}")
    if is_sm90(source):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(archs)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def is_sm90(source: Path) -> bool:
    """True for the sources of the sm90 family."""
    return source.parent.name == "sm90" or "_sm90_" in source.name


def kernel_sources(archs: Sequence[int]) -> list[str]:
    """Sources of the CUDA kernel families for these architectures, relative to the root."""
    if not archs:
        return []
    csrc = ROOT / "csrc"
    patterns = ("device/*.cu", "sm80/*.cpp", "sm90/*.cpp", "sm90/*.cu", "units/*.cu")
    found = [path for pattern in patterns for path in csrc.glob(pattern)]
    absent = csrc / "sm90" / "absent.cpp"
    if 90 in archs:
        found.remove(absent)
    else:
        found = [path for path in found if path == absent or not is_sm90(path)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def sources(archs: Sequence[int]) -> list[str]:
    """Source files of the module, relative to the repository's root."""
    csrc = ROOT / "csrc"
    found = [*csrc.glob("config/*.cpp"), *csrc.glob("cpu/*.cpp")]
    binding = list(csrc.glob("binding/*.cpp"))
    found += [path for path in binding if archs or not path.name.startswith("cuda_")]
    return sorted([*(str(path.relative_to(ROOT)) for path in found), *kernel_sources(archs)])


def define_macros(
    archs: Sequence[int], environ: Mapping[str, str] = os.environ
) -> list[tuple[str, str]]:
    """Macros that tell the C++ code what was compiled."""
    kernels = environ.get("FLASH_ATTN_KERNELS", "")
    if not re.fullmatch(r"[\w/,]*", kernels):
        raise ValueError(
            f"FLASH_ATTN_KERNELS: expected comma-separated prefixes of kernel rows, like "
            f'"fwd/sm80/128/bf16,bwd/sm80/64"; got {kernels!r}'
        )
    arch_list = ";".join(map(str, archs))
    return [
        ("TORCH_STABLE_ONLY", "1"),
        ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)),
        ("FLASH_ATTN_CUDA_ARCHS", f'"{arch_list}"'),
        ("FLASH_ATTN_KERNELS", f'"{kernels}"'),
    ]


def module_facts(plan: Plan, version: str) -> list[str]:
    """C++ flags with what the module reports of its build.

    nvcc does not get them: a new version then recompiles no kernel.
    """
    cuda_version = nvcc_version(plan.cuda_home) if plan.cuda_home else ""
    return [
        f'-DFLASH_ATTN_VERSION="{version}"',
        f'-DFLASH_ATTN_CUDA_VERSION="{cuda_version}"',
    ]


CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags ask for debug information
    "-DNDEBUG",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-warning-option",  # clang does not know the next one
    "-Wno-stringop-overflow",  # GCC 12 reports std::vector's own copies
]


def nvcc_flags(cuda_version: str) -> list[str]:
    """Flags of a toolkit "12.9": those that one of 12.3 knows too."""
    has_modes = tuple(map(int, cuda_version.split("."))) >= (12, 8)
    return [
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
        "--compress-mode=size" if has_modes else "-Xfatbin=-compress-all",
        "-Xcompiler=-Wall,-Wextra,-Werror",
        "-Xptxas=-v",  # for the gate, which judges spills and local memory
    ]


def cxx_flags(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Warnings are errors for who works on the code, but must not keep a user from installing."""
    return [*CXX_FLAGS, *(["-Werror"] if environ.get("FLASH_ATTN_WERROR") else [])]


def job_count(cuda: bool, environ: Mapping[str, str] = os.environ) -> int:
    """Parallel compile jobs: cores, free memory, and MAX_JOBS as an upper bound."""
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_gib()
    if free is not None:
        jobs = min(jobs, int(free / (GIB_PER_JOB if cuda else GIB_PER_JOB / 2)))
    if environ.get("MAX_JOBS", "").isdigit():
        jobs = min(jobs, int(environ["MAX_JOBS"]))
    return max(jobs, 1)


def free_gib() -> float | None:
    """Memory that can be had without swapping: the machine's, or what a container is given."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = int(found.group(1)) / 2**20 if found else None
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        left = (int(limit.read_text()) - int(used.read_text())) / 2**30
        free = left if free is None else min(free, left)
    return free
