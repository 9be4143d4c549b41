"""What is installed, what of it works here, what is missing, and who can use it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flash_attn import __version__, flash_attn_func, ops
from flash_attn.commands.importers import Verdict, verdicts

# Kernel families for GPUs, and the oldest architecture that each runs on. That of Hopper runs on
# Hopper alone.
GPU_FAMILIES = {"sm80": 80, "sm90": 90}

REBUILD = "run `pip install .` in the source tree"
REBUILD_FOR_GPU = f'with FLASH_ATTN_CUDA_ARCHS="80;90" set, {REBUILD}'


@dataclass
class Gpu:
    name: str
    compute_capability: int  # 90 for 9.0
    memory_gib: float


@dataclass
class Backend:
    """`works` is the result of a small call; where it is False, `why_not` says why."""

    name: str
    built: bool
    works: bool
    why_not: str = ""


@dataclass
class Report:
    version: str
    python: str
    platform: str
    torch: str
    torch_cuda: str | None
    driver: str | None
    nvcc: str | None
    gpus: list[Gpu]
    module: str | None
    build: ops.BuildInfo | None
    backends: list[Backend]
    missing: list[str] = field(default_factory=list)
    importers: list[Verdict] = field(default_factory=list)


def driver_version() -> str | None:
    """Version of NVIDIA's driver, None without one."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    command = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = asked.stdout.split()
    return lines[0] if lines else None


def nvcc_path() -> str | None:
    """The CUDA compiler that a build would use."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        candidate = Path(os.environ.get(name, ""), "bin", "nvcc")
        if os.environ.get(name) and candidate.exists():
            return str(candidate)
    return shutil.which("nvcc")


def visible_gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor
        gpus.append(Gpu(properties.name, capability, round(properties.total_memory / 2**30, 1)))
    return gpus


def runs_on(family: str, archs: list[int], compute_capability: int) -> bool:
    """Machine code runs within its major version; PTX, of the newest arch only, on all later."""
    if family == "sm90":
        return compute_capability == 90 and 90 in archs
    same_major = (arch for arch in archs if arch // 10 == compute_capability // 10)
    return bool(archs) and (
        any(arch <= compute_capability for arch in same_major) or max(archs) <= compute_capability
    )


def try_call(device: str) -> str:
    """Reason why a small call on the device fails; empty if it works."""
    try:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        q = torch.zeros(1, 8, 1, 64, device=device, dtype=dtype)
        rows = torch.arange(8, device=device, dtype=dtype).view(1, 8, 1, 1)
        out = flash_attn_func(q, q, rows.expand_as(q).contiguous(), causal=True)
        assert isinstance(out, torch.Tensor)
        # Equal scores: row i is the mean of 0..i.
        if not torch.allclose(out, (rows / 2).expand_as(q), rtol=1e-2):
            return "a small call gave a wrong result"
    except Exception as error:  # whatever goes wrong is what the report is for
        return f"{type(error).__name__}: {error}"
    return ""


def gpu_backend(family: str, build: ops.BuildInfo, gpus: list[Gpu]) -> Backend:
    if not any(row.split("/")[1] == family for row in build["rows"]):
        return Backend(family, built=False, works=False, why_not="not in this build")
    if not gpus:
        return Backend(family, built=True, works=False, why_not="PyTorch sees no GPU here")
    archs = [int(arch) for arch in build["cuda_archs"] if int(arch) >= GPU_FAMILIES[family]]
    for index, gpu in enumerate(gpus):
        if not runs_on(family, archs, gpu.compute_capability):
            built_for = "90" if family == "sm90" else ";".join(build["cuda_archs"])
            why_not = f"cuda:{index} is sm_{gpu.compute_capability}, built for {built_for}"
        else:
            with ops.newest_kernel_family(GPU_FAMILIES[family]):
                why_not = try_call(f"cuda:{index}")
        if why_not:
            return Backend(family, built=True, works=False, why_not=why_not)
    return Backend(family, built=True, works=True)


def make_backends(build: ops.BuildInfo | None, gpus: list[Gpu]) -> list[Backend]:
    if build is None:
        why_not = "the compiled module is missing or could not be loaded"
        return [Backend(name, False, False, why_not) for name in ("cpu", *GPU_FAMILIES)]
    why_not = try_call("cpu")
    cpu = Backend("cpu", built=True, works=not why_not, why_not=why_not)
    return [cpu, *(gpu_backend(family, build, gpus) for family in GPU_FAMILIES)]


def missing_parts(report: Report, load_error: str | None) -> list[str]:
    """What keeps parts of this installation from working, each with its remedy."""
    missing = []
    build = report.build
    if too_old := ops.too_old_torch(report.torch):
        missing.append(f"the compiled module flash_attn._C: {too_old}")
    elif build is None:
        missing.append(f"the compiled module flash_attn._C ({load_error}): {REBUILD}")
    elif build["version"] != report.version:
        missing.append(
            f"a compiled module of version {report.version}, this one is {build['version']}: "
            f"{REBUILD}"
        )
    if build is not None and build["kernels"]:
        missing.append(
            f"kernels other than FLASH_ATTN_KERNELS={build['kernels']}: without that variable, "
            f"{REBUILD}"
        )
    if build is not None and report.gpus and not build["cuda_archs"]:
        compiler = "" if report.nvcc else "install a CUDA toolkit (nvcc), then "
        missing.append(f"GPU kernels: {compiler}{REBUILD_FOR_GPU}")
    if report.driver and not report.gpus:
        missing.append(
            f"a PyTorch that can use the GPU here: {report.torch} sees none; install one built for "
            "a CUDA version that the driver supports"
        )
    for gpu in report.gpus:
        if gpu.compute_capability < min(GPU_FAMILIES.values()):
            missing.append(
                f"kernels for {gpu.name} (sm_{gpu.compute_capability}): there are none; the oldest "
                f"supported GPUs are Ampere's (sm_80)"
            )
    return missing


def make_report() -> Report:
    build = ops.build_info() if ops.load_error is None else None
    spec = importlib.util.find_spec("flash_attn._C")
    gpus = visible_gpus()
    report = Report(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        driver=driver_version(),
        nvcc=nvcc_path(),
        gpus=gpus,
        module=spec.origin if spec else None,
        build=build,
        backends=make_backends(build, gpus),
        importers=verdicts(),
    )
    report.missing = missing_parts(report, ops.load_error)
    return report


def summary_of_rows(rows: list[str]) -> list[str]:
    """Rows such as "fwd/sm80/64/bf16/extras" in one line for each pass and family."""
    lines = []
    for prefix in sorted({"/".join(row.split("/")[:2]) for row in rows}, reverse=True):
        parts = [row.split("/")[2:] for row in rows if row.startswith(prefix + "/")]
        head_dims = ", ".join(map(str, sorted({int(head_dim) for head_dim, *_ in parts})))
        dtypes = ", ".join(sorted({dtype for _, dtype, *_ in parts}))
        line = f"{prefix}: head dims up to {head_dims} in {dtypes}"
        with_extras = [int(head_dim) for head_dim, _, *extras in parts if extras]
        if with_extras:
            line += f"; softcap, ALiBi and dropout up to {max(with_extras)}"
        lines.append(line)
    return lines


def text_of(report: Report) -> str:
    build = report.build
    lines = [
        f"flash_attn  {report.version}",
        f"python      {report.python}, {report.platform}",
        f"torch       {report.torch}, CUDA {report.torch_cuda or 'not built in'}",
        f"driver      {report.driver or 'none'}",
        f"nvcc        {report.nvcc or 'none (needed only to build GPU kernels)'}",
        f"module      {report.module or 'missing'}",
    ]
    lines += [
        f"gpu         {gpu.name}, sm_{gpu.compute_capability}, {gpu.memory_gib} GiB"
        for gpu in report.gpus
    ]
    if not report.gpus:
        lines.append("gpu         none that PyTorch sees")
    if build is not None:
        lines.append(f"built with  torch {build['torch_version']}")
    if build is not None and build["cuda_archs"]:
        archs = ";".join(build["cuda_archs"])
        lines.append(f"built for   {archs} with CUDA {build['cuda_version']}")
        lines += [f"kernels     {line}" for line in summary_of_rows(build["rows"])]
    for backend in report.backends:
        lines.append(f"backend     {backend.name}: {'works' if backend.works else backend.why_not}")
    lines += [f"missing     {sentence}" for sentence in report.missing]
    lines += [f"importer    {verdict.text()}" for verdict in report.importers]
    return "\n".join(lines)


def is_complete(report: Report) -> bool:
    """The CPU backend works, and where there are GPUs a GPU backend does too."""
    working = {backend.name for backend in report.backends if backend.works}
    return "cpu" in working and (not report.gpus or bool(working & GPU_FAMILIES.keys()))
