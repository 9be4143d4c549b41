"""Which kernel of which backend serves a call, and why the others do not.

The compiled module selects, by the rules of its kernel tables, for any GPU: none has to be there.
Where a family has no kernel, its reason is found by asking again with less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flash_attn import ops
from flash_attn.commands.report import GPU_FAMILIES, runs_on
from flash_attn.problem import MAX_HEAD_DIM
from flash_attn.verify import Problem

# Shared memory that one thread block may have, by compute capability; in KiB.
_SMEM_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
_HEAD_DIM_STEP = 8  # of GPU kernels; other head dims are filled up with zeros, in copies
_PASSES = {"forward": False, "backward": True}


@dataclass(frozen=True)
class Target:
    """A CPU (arch is None), or a GPU."""

    name: str
    arch: int | None = None
    smem_bytes: int = 0


@dataclass
class Choice:
    """The backend and kernel of one pass, and why each newer or other backend is not it."""

    backend: str | None
    kernel: dict[str, Any] | None
    others: dict[str, str]


@dataclass
class Served:
    passes: dict[str, Choice]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Request:
    """What a kernel is selected by, without the pass and the GPU."""

    dtype: str
    batch_size: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    window_left: int
    window_right: int
    softcap: bool
    alibi: bool
    dropout: bool
    packed: bool


def add_target_options(add: Callable[..., object]) -> None:
    add("--arch", help="cpu, or a compute capability like 80 or 90 (default: of --device)")
    add("--packed", action="store_true", help="packed sequences: --batch of --seqlen tokens each")


def named_target(name: str) -> Target:
    """Of "cpu", "90", "9.0" or "sm_90"."""
    if name == "cpu":
        return Target("a CPU")
    text = name.removeprefix("sm_").replace(".", "")
    if not text.isdigit():
        raise ValueError(f"--arch: expected cpu or a compute capability like 90, got {name}")
    arch = int(text)
    smem = _SMEM_KIB.get(arch, min(_SMEM_KIB.values()))
    return Target(f"sm_{arch}", arch, 1024 * smem)


def target_of(options: argparse.Namespace) -> Target:
    if options.arch is not None:
        return named_target(options.arch)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return named_target("cpu")
    properties = torch.cuda.get_device_properties(device)
    target = named_target(f"{properties.major}{properties.minor}")
    return replace(target, name=f"{properties.name} ({target.name})")


def _check(problem: Problem) -> None:
    for name in ("batch", "seqlen", "seqlen_k", "heads", "heads_k"):
        if getattr(problem, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(problem, name)}")
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim: expected 1 to {MAX_HEAD_DIM}, got {problem.head_dim}")
    if problem.heads % problem.heads_k:
        raise ValueError(
            f"heads: expected a multiple of the {problem.heads_k} heads_k, got {problem.heads}"
        )


def _request_of(problem: Problem, packed: bool) -> _Request:
    head_dim = -(-problem.head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP
    sequences = problem.batch if packed else 1
    left, right = problem.window
    return _Request(
        dtype=problem.dtype,
        batch_size=problem.batch,
        seqlen_q=sequences * problem.seqlen,
        seqlen_k=sequences * problem.seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim,
        window_left=left,
        window_right=0 if problem.causal else right,
        softcap=bool(problem.softcap),
        alibi=bool(problem.alibi),
        dropout=bool(problem.dropout),
        packed=packed,
    )


def _select(backward: bool, family: str, target: Target, request: _Request) -> Any:
    """A row as a dictionary, or a list of reasons."""
    arch = GPU_FAMILIES[family]
    text = torch.ops.flash_attn.select_kernel(
        backward, arch, target.arch, target.smem_bytes, *vars(request).values()
    )
    return json.loads(text)


def _reason_of_table(backward: bool, family: str, target: Target, request: _Request) -> str:
    """What in the request the family has no kernel for."""

    def serves(**changes: Any) -> bool:
        changed = replace(request, **changes)
        return isinstance(_select(backward, family, target, changed), dict)

    if request.dtype == "float32" and serves(dtype="bfloat16"):
        return "it has no kernel for float32; for bfloat16 and float16 it has"
    has_options = request.softcap or request.alibi or request.dropout
    if has_options and serves(softcap=False, alibi=False, dropout=False):
        steps = range(_HEAD_DIM_STEP, MAX_HEAD_DIM + 1, _HEAD_DIM_STEP)
        served = [step for step in steps if serves(head_dim=step, head_dim_v=step)]
        text = f"it has no kernel with softcap, ALiBi or dropout at head dim {request.head_dim}"
        return f"{text}, only up to {served[-1]}" if served else text
    reasons = _select(backward, family, target, request)
    return "; ".join(reasons) or "no row of its kernel table takes this call"


def _why_not_here(family: str, target: Target, build: ops.BuildInfo) -> str:
    """Why no kernel of the family runs on the target, whatever the call; empty if some do."""
    assert target.arch is not None
    if family == "sm90" and target.arch != GPU_FAMILIES[family]:
        return "its kernels run on compute capability 9.0 alone"
    if target.arch < GPU_FAMILIES[family]:
        return "its kernels need compute capability 8.0 or later"
    if not any(row.split("/")[1] == family for row in build["rows"]):
        return "it is not in this build (FLASH_ATTN_CUDA_ARCHS)"
    archs = [int(arch) for arch in build["cuda_archs"]]
    if not runs_on(family, archs, target.arch):
        return f"this build is for {';'.join(build['cuda_archs'])} (FLASH_ATTN_CUDA_ARCHS)"
    return ""


def _choose(backward: bool, target: Target, request: _Request, build: ops.BuildInfo) -> Choice:
    if target.arch is None:
        return Choice("cpu", None, {name: "it takes CUDA tensors" for name in GPU_FAMILIES})
    others = {"cpu": "it takes CPU tensors"}
    for family in sorted(GPU_FAMILIES, key=lambda name: -GPU_FAMILIES[name]):
        why_not = _why_not_here(family, target, build)
        if not why_not:
            selected = _select(backward, family, target, request)
            if isinstance(selected, dict):
                older = {name for name in GPU_FAMILIES if name not in others and name != family}
                others |= {name: f"{family} is newer and serves it" for name in older}
                return Choice(family, selected, others)
            why_not = _reason_of_table(backward, family, target, request)
        others[family] = why_not
    return Choice(None, None, others)


def serve(problem: Problem, target: Target, packed: bool = False) -> Served:
    """Which backends serve both passes of the call on the target.

    Raises:
        ValueError: there is no such call.
        RuntimeError: there is no compiled module to ask.
    """
    _check(problem)
    build = ops.build_info()
    request = _request_of(problem, packed)
    served = Served(
        {name: _choose(backward, target, request, build) for name, backward in _PASSES.items()}
    )
    if target.arch is not None:
        if problem.head_dim % _HEAD_DIM_STEP:
            served.notes.append(
                f"head dim {problem.head_dim} is no multiple of {_HEAD_DIM_STEP}: q, k and v are "
                f"copied into tensors of head dim {request.head_dim}"
            )
        if any(choice.backend == "sm90" for choice in served.passes.values()):
            served.notes.append(
                "sm90 needs strides that are multiples of 16 bytes and not 0, as those of new "
                "tensors are; sm80 serves others"
            )
    return served


def _kernel_text(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return "every dtype and head dim"
    return (
        f"{kernel['name']}, tile {kernel['tile_m']} x {kernel['tile_n']}, {kernel['threads']} "
        f"threads, {kernel['smem_bytes'] / 1024:.0f} KiB of shared memory"
    )


def text_of_served(problem: Problem, target: Target, served: Served, packed: bool) -> str:
    lines = [f"call        {problem.text(target.name)}{', packed' if packed else ''}"]
    for name, choice in served.passes.items():
        if choice.backend is None:
            lines.append(f"{name:<12}no backend serves it")
        else:
            lines.append(f"{name:<12}{choice.backend}: {_kernel_text(choice.kernel)}")
        lines += [f"            not {other}: {why}" for other, why in choice.others.items()]
    lines += [f"note        {note}" for note in served.notes]
    return "\n".join(lines)
