"""What the wheels of `make wheel` are called and promise.

FLASH_ATTN_RELEASE makes a build one of these: it gets a version that names its CUDA toolkit, and
loads beside the glibc of PLATFORM. A plain `pip install .` is for the machine that it runs on and
promises neither.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools import build_plan, old_glibc

PYTHON_TAG, ABI_TAG = "cp310", "abi3"  # the module uses two functions of Python's limited API
PLATFORM = "manylinux_{}_{}".format(*old_glibc.OLDEST)
MAX_MEGABYTES = 60
VERSION_LINE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def is_release(environ: Mapping[str, str] = os.environ) -> bool:
    return bool(environ.get("FLASH_ATTN_RELEASE"))


def platform_tag() -> str:
    return f"{PLATFORM}_{platform.machine()}"


def source_version(root: Path = build_plan.ROOT) -> str:
    """The one statement of the version, without importing the package."""
    found = VERSION_LINE.search((root / "flash_attn" / "version.py").read_text())
    if found is None:
        raise RuntimeError("expected __version__ in flash_attn/version.py")
    return found.group(1)


def label(archs: Sequence[int], cuda_version: str, kernels: str) -> str:
    """What a wheel adds to the version: cpu, cu130; what else is unusual of it.

    It follows our own number, so that of two wheels pip takes the newer one, whatever the toolkit.
    """
    if not archs:
        return "cpu"
    parts = ["cu" + cuda_version.replace(".", "")]
    if tuple(archs) != build_plan.WHEEL_ARCHS:
        parts += [f"sm{arch}" for arch in archs]
    return ".".join([*parts, "partial"] if kernels else parts)


def package_version(environ: Mapping[str, str] = os.environ) -> str:
    """Version of what this build makes. Other builds than those of wheels have no label."""
    if not is_release(environ):
        return source_version()
    plan = build_plan.make_plan(environ)
    cuda_version = build_plan.nvcc_version(plan.cuda_home) if plan.cuda_home else ""
    kernels = environ.get("FLASH_ATTN_KERNELS", "")
    return f"{source_version()}.{label(plan.archs, cuda_version, kernels)}"


def with_version(text: str, version: str) -> str:
    """The text of version.py with another version."""
    return VERSION_LINE.sub(f'__version__ = "{version}"', text)
