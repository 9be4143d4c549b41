"""What programs that import flash_attn will make of this installation.

Each asks for something before it does: a distribution's name, a range of versions, names, and
parameters, without which it drops an option or fails to import. The gates were read in the sources
of the releases named; nothing of these programs is imported here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

DISTRIBUTION = "flash-attn"
_INTERFACE = "flash_attn.flash_attn_interface"


@dataclass(frozen=True)
class Gate:
    """What one program asks for."""

    name: str
    distribution: str
    read_in: str  # release whose source says so
    oldest: str = ""  # of our version, inclusive; empty: any
    newest: str = ""  # inclusive
    below: str = ""  # exclusive
    imports: tuple[str, ...] = ()  # "module:name"
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of "module:name"
    needs_gpu: bool = False


@dataclass
class Verdict:
    name: str
    installed: str | None  # version of the program here
    read_in: str
    accepts: bool
    reasons: list[str]  # against

    def text(self) -> str:
        here = f"{self.installed} installed" if self.installed else "not installed"
        verdict = "takes it" if self.accepts else "; ".join(self.reasons)
        return f"{self.name}: {verdict} ({here}; gates of {self.read_in})"


_MASKS = ("causal", "window_size")
_RAW = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "alibi_slopes")
_RAW_WINDOW = ("window_size_left", "window_size_right", "softcap")

GATES = (
    Gate(
        "transformers",
        "transformers",
        "5.17",
        oldest="2.3.3",
        imports=(
            "flash_attn:flash_attn_func",
            "flash_attn:flash_attn_with_kvcache",
            "flash_attn.bert_padding:pad_input",
            "flash_attn.bert_padding:unpad_input",
        ),
        parameters={
            "flash_attn:flash_attn_varlen_func": (
                *("dropout_p", "softmax_scale", *_MASKS, "softcap", "deterministic", "s_aux"),
            )
        },
        needs_gpu=True,
    ),
    Gate(
        "Transformer Engine",
        "transformer-engine",
        "2.20",
        oldest="2.1.1",
        below="2.8.4",
        imports=("flash_attn_2_cuda:varlen_bwd", "flash_attn:flash_attn_func"),
        parameters={
            "flash_attn:flash_attn_varlen_func": (*_MASKS, "alibi_slopes", "softcap", "block_table")
        },
    ),
    Gate(
        "xformers",
        "xformers",
        "0.0.35",
        oldest="2.7.1",
        newest="2.8.4",
        imports=tuple(
            f"{_INTERFACE}:flash_attn_gpu.{name}" for name in ("fwd", "varlen_fwd", "bwd")
        ),
    ),
    Gate(
        "diffusers",
        "diffusers",
        "0.42",
        oldest="2.6.3",
        imports=(
            "flash_attn:flash_attn_func",
            "flash_attn:flash_attn_varlen_func",
            f"{_INTERFACE}:_wrapped_flash_attn_forward",
            f"{_INTERFACE}:_wrapped_flash_attn_backward",
        ),
    ),
    Gate(
        "ring-flash-attn",
        "ring-flash-attn",
        "0.1.8",
        imports=(f"{_INTERFACE}:_flash_attn_varlen_backward",),
        parameters={
            f"{_INTERFACE}:_flash_attn_forward": (*_RAW, *_RAW_WINDOW, "return_softmax"),
            f"{_INTERFACE}:_flash_attn_varlen_forward": (*_RAW, *_RAW_WINDOW, "cu_seqlens_q"),
            f"{_INTERFACE}:_flash_attn_backward": ("dout", "softmax_lse", "dq", "dk", "dv"),
        },
    ),
    Gate(
        "yunchang",
        "yunchang",
        "0.6.4",
        oldest="2.7",
        imports=("flash_attn:flash_attn_func", f"{_INTERFACE}:_flash_attn_backward"),
        parameters={f"{_INTERFACE}:_flash_attn_forward": (*_RAW, *_RAW_WINDOW)},
    ),
    Gate(
        "Megatron-core",
        "megatron-core",
        "0.19",
        parameters={
            "flash_attn:flash_attn_varlen_func": ("block_table", "return_attn_probs"),
            "flash_attn:flash_attn_with_kvcache": ("num_splits", "return_softmax_lse"),
        },
    ),
    Gate(
        "DeepSpeed",
        "deepspeed",
        "its main branch",
        oldest="2.7",
        parameters={
            f"{_INTERFACE}:_flash_attn_forward": _RAW_WINDOW,
            f"{_INTERFACE}:_flash_attn_backward": ("rng_state",),
        },
    ),
    Gate("axolotl", "axolotl", "0.19", oldest="2.8.3", newest="2.8.3"),
    Gate(
        "SGLang",
        "sglang",
        "0.5.23",
        parameters={"flash_attn:flash_attn_varlen_func": ("return_attn_probs",)},
    ),
)


def public_version(version: str) -> tuple[int, ...]:
    """(2, 8, 3) of "2.8.3+0.1.0": without what stands behind a plus or is no number."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _against_version(gate: Gate, version: str) -> Iterator[str]:
    public = public_version(version)
    if gate.oldest and public < public_version(gate.oldest):
        yield f"asks for version {gate.oldest} or newer, this is {version}"
    if gate.newest and public > public_version(gate.newest):
        yield f"asks for version {gate.newest} or older, this is {version}"
    if gate.below and public >= public_version(gate.below):
        yield f"asks for a version before {gate.below}, this is {version}"


def _find(path: str) -> Any:
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in names.split("."):
        found = getattr(found, name, None)
    return found


def _against_names(gate: Gate) -> Iterator[str]:
    for path in (*gate.imports, *gate.parameters):
        found = _find(path)
        if found is None:
            yield f"imports {path.replace(':', '.')}, which is missing"
            continue
        # A custom op of torch has the signature of the function that it was made of.
        function = getattr(found, "_init_fn", found)
        wanted = gate.parameters.get(path, ())
        there = inspect.signature(function).parameters if wanted else {}
        for name in wanted:
            if name not in there:
                yield f"passes {name} to {path.partition(':')[2]}, which has no such parameter"


def _against_distribution() -> Iterator[str]:
    """What every program sees of how the package is installed."""
    if installed_version(DISTRIBUTION) is None:
        yield "no distribution flash-attn is installed (pip install . in the source tree)"
        return
    listed = importlib.metadata.distribution(DISTRIBUTION).read_text("top_level.txt") or ""
    for name in ("flash_attn", "flash_attn_2_cuda"):
        if name not in listed.split():
            yield f"top_level.txt of flash-attn does not list {name}: install it again"


def judge(gate: Gate, version: str | None, against_all: list[str]) -> Verdict:
    """What the program of `gate` makes of this package in `version`."""
    reasons = list(against_all)
    if version is not None:
        reasons += _against_version(gate, version)
    reasons += _against_names(gate)
    if gate.needs_gpu and not torch.cuda.is_available():
        reasons.append("uses it only where PyTorch sees a GPU")
    installed = installed_version(gate.distribution)
    return Verdict(gate.name, installed, gate.read_in, not reasons, reasons)


def verdicts() -> list[Verdict]:
    """Of every program in GATES on the installed package."""
    version, against_all = installed_version(DISTRIBUTION), list(_against_distribution())
    return [judge(gate, version, against_all) for gate in GATES]
