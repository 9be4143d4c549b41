"""Trains one small GPT twice, with flash_attn and with attention that materialises its scores.

    python examples/train_gpt.py                              # CPU: two runs of a minute or less
    python examples/train_gpt.py --attention all              # PyTorch's fused attention as well
    python examples/train_gpt.py --attention fused            # GPU: beside PyTorch's and cuDNN's
    python examples/train_gpt.py --seqlen 8192 --batch 1 --steps 100     # GPU: memory side by side
    python examples/train_gpt.py --seqlen 16384 --batch 1 --steps 50     # standard does not fit

Attention that materialises its scores keeps 6 bytes of every score of every layer for its backward:
with the defaults on a GPU, bf16 and 8 layers of 16 heads, that is 48 GiB at 8192 tokens and 192 GiB
at 16384. Tiled attention keeps none.

Every run starts from the same weights, sees the same batches, and has a process of its own, so that
its peak memory is its own. Exits with 1 if the runs part: the loss curves, or the gradients of one
model at the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpt import ATTENTIONS, Gpt
from report import plot, table
from torch import Tensor

RUNS = {
    "both": ["flash", "standard"],
    "all": ["flash", "sdpa", "standard"],
    "fused": ["flash", "sdpa", "cudnn"],
}

# Defaults on a GPU and on CPU.
DEFAULTS = {
    "dtype": ("bf16", "fp32"),
    "seqlen": (2048, 1024),
    "batch": (4, 2),
    "steps": (200, 80),
    "layers": (8, 3),
    "heads": (16, 4),
    "head_dim": (64, 32),
}

SHOWN_OPTIONS = (
    "device",
    "dtype",
    "seqlen",
    "batch",
    "steps",
    "layers",
    "heads",
    "head_dim",
    "seed",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Rounding differs between the runs, and training amplifies it: the losses of correct runs drift
# apart, while their gradients at equal weights stay within a few units of rounding. A wrong mask or
# scale moves both far beyond. Bounds: nats of the loss, in fp32 at any step, in bf16 in the mean,
# for at single steps PyTorch's own two attentions part by 0.17 nats in bf16 (CPU, 60 steps of 2 x
# 512 tokens), by 0.014 in the mean; gradient error relative to the gradient's norm.
LOSS_BOUND = {"fp32": 1e-3, "bf16": 0.05}
GRADIENT_BOUND = {"fp32": 1e-4, "bf16": 3e-2}


def load_text(path: Path | None) -> Tensor:
    """Bytes to train on: a file, or the language reference that ships with Python."""
    if path is not None:
        text = path.read_bytes()
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch_at(step: int, text: Tensor, args: argparse.Namespace) -> Tensor:
    """The (batch, seqlen + 1) tokens of a step: the same in every run of one seed."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - args.seqlen, (args.batch,), generator=generator)
    rows = torch.stack([text[start : start + args.seqlen + 1] for start in starts])
    return rows.long().to(args.device)


def new_model(name: str, args: argparse.Namespace) -> Gpt:
    options = {"scale_factor": args.flash_scale_factor} if name == "flash" else {}
    sizes = {"num_layers": args.layers, "num_heads": args.heads, "head_dim": args.head_dim}
    model = Gpt(ATTENTIONS[name](**options), seqlen=args.seqlen, seed=args.seed, **sizes)
    return model.to(args.device)


def loss_of(model: Gpt, tokens: Tensor, args: argparse.Namespace) -> Tensor:
    dtype = DTYPES[args.dtype]
    with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
        return model.loss(tokens)


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process; elsewhere than on Linux always the peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """CUDA: most bytes that PyTorch had allocated. CPU: growth of the process's resident memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at VmRSS
            self.before = resident_bytes("VmRSS")

    def bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.before


def progress(steps: int, name: str) -> Iterator[int]:
    """Counts to `steps` with a bar: tqdm's, or a plain one where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        for step in range(steps):
            if step % max(1, steps // 10) == 0:
                print(f"{name}: step {step} of {steps}", file=sys.stderr, flush=True)
            yield step
    else:
        interval = 0.1 if sys.stderr.isatty() else 10.0
        yield from tqdm(range(steps), desc=f"{name:>8}", mininterval=interval, unit="step")


def checked_steps(steps: int) -> list[int]:
    """Steps at whose weights the gradients of the attentions are compared."""
    return sorted({0, steps // 2, steps - 1})


def optimise(
    model: Gpt, text: Tensor, args: argparse.Namespace, steps: Iterable[int], snapshots: Path | None
) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step; weights before the checked steps go to `snapshots`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95))
    peak_rate = args.lr or 3e-3 * 128 / (args.heads * args.head_dim)
    losses, seconds = [], []
    for step in steps:
        if snapshots is not None and step in checked_steps(args.steps):
            torch.save(model.state_dict(), snapshots / f"step{step}.pt")
        tokens = batch_at(step, text, args)
        start = time.perf_counter()
        warm_up = min(1.0, (step + 1) / (0.1 * args.steps))
        cool_down = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warm_up * cool_down
        loss = loss_of(model, tokens, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def train(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, in its own process. Leaves its weights in `folder` for the checks that follow."""
    text = load_text(args.data)
    # A tiny run first, so that the code of the libraries is loaded before memory is measured.
    small = argparse.Namespace(**{**vars(args), "seqlen": 16, "batch": 1})
    optimise(new_model(name, small), text, small, range(1), None)
    memory = PeakMemory(args.device)
    try:
        model = new_model(name, args)
        steps = progress(args.steps, name)
        losses, seconds = optimise(model, text, args, steps, folder if name == "flash" else None)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {"fits": False, "reason": str(error).splitlines()[0]}
    peak = memory.bytes()
    torch.save(model.state_dict(), folder / f"{name}.pt")
    step_seconds = statistics.median(seconds[len(seconds) // 10 :])
    return {
        "fits": True,
        "losses": losses,
        "step_seconds": step_seconds,
        "tokens_per_second": args.batch * args.seqlen / step_seconds,
        "peak_bytes": peak,
    }


def run(name: str, argv: list[str], folder: Path) -> dict[str, Any]:
    """`train` in a process of its own."""
    worker = [sys.executable, __file__, *argv, "--worker", name, "--folder", str(folder)]
    # Threads that wait give up their core: spinning ones stall each other on a busy machine.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run(worker, check=False, env=environment).returncode
    if code == -9:
        return {"fits": False, "reason": "killed by the system, which it does when memory runs out"}
    if code != 0:
        sys.exit(f"the {name} run failed with exit code {code}; its error is above")
    return json.loads((folder / f"{name}.json").read_text())


def gradients(name: str, weights: dict[str, Tensor], tokens: Tensor, args: argparse.Namespace):
    model = new_model(name, args)
    model.load_state_dict(weights)
    loss_of(model, tokens, args).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters()}


def check_gradients(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Gradients of flash and standard attention at equal weights, from snapshots of the flash run.

    Where standard attention does not fit, the batch is cut to one sequence and that is halved
    until it does.
    """
    text, checks, seqlen, batch = load_text(args.data), [], args.seqlen, args.batch
    for step in checked_steps(args.steps):
        weights = torch.load(folder / f"step{step}.pt", weights_only=True)
        while True:
            tokens = batch_at(step, text, args)[:batch, : seqlen + 1]
            try:
                want = gradients("standard", weights, tokens, args)
                break
            except RuntimeError as error:
                if not out_of_memory(error) or seqlen == 1:
                    raise
            batch, seqlen = 1, seqlen if batch > 1 else seqlen // 2
        got = gradients("flash", weights, tokens, args)
        relative = {k: float((got[k] - want[k]).norm() / want[k].norm()) for k in want}
        worst = max(relative, key=lambda key: relative[key])
        largest = max(float((got[k] - want[k]).abs().max()) for k in want)
        checks.append({"step": step, "relative": relative[worst], "parameter": worst,
                       "absolute": largest, "batch": batch, "seqlen": seqlen})  # fmt: skip
    return max(checks, key=lambda check: check["relative"])


def compare(runs: dict[str, Any], gradient: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Largest differences, and in "parted" one sentence for each that is beyond its bound."""
    differences: dict[str, Any] = {"loss": {}, "gradient": gradient, "parted": []}
    flash = runs.get("flash", {"fits": False})
    for name, other in runs.items():
        if name != "flash" and flash["fits"] and other["fits"]:
            pairs = zip(flash["losses"], other["losses"], strict=True)
            apart = torch.tensor([abs(a - b) for a, b in pairs], dtype=torch.float64)
            differences["loss"][name] = apart.max().item()  # NaN if any is, as of mean()
            nats = (apart.max() if dtype == "fp32" else apart.mean()).item()
            if not nats <= LOSS_BOUND[dtype]:  # written so that NaN counts as parted
                differences["parted"].append(
                    f"the losses of flash and {name} differ by {nats:.2g} nats "
                    f"{'at a step' if dtype == 'fp32' else 'in the mean'}, more than "
                    f"{LOSS_BOUND[dtype]:g}"
                )
    if gradient is not None and not gradient["relative"] <= GRADIENT_BOUND[dtype]:
        differences["parted"].append(
            f"the gradients of flash and standard differ by {gradient['relative']:.2g} of "
            f"{gradient['parameter']} at step {gradient['step']}, more than "
            f"{GRADIENT_BOUND[dtype]:g}"
        )
    return differences


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="defaults on a GPU, on CPU: "
        + ", ".join(f"{name} {gpu}, {cpu}" for name, (gpu, cpu) in DEFAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--attention", choices=[*RUNS, *ATTENTIONS], default="both")
    add("--data", type=Path, help="train on the bytes of this file")
    add("--device", choices=["cpu", "cuda"], default=device)
    add("--dtype", choices=list(DTYPES))
    add("--seqlen", type=int)
    add("--batch", type=int)
    add("--steps", type=int)
    add("--layers", type=int)
    add("--heads", type=int)
    add("--head-dim", type=int)
    add("--lr", type=float, help="peak learning rate; default: by width")
    add("--seed", type=int, default=0)
    add("--sample-bytes", type=int, default=300, help="length of the text sampled at the end")
    add("--out", type=Path, default=Path("out/train_gpt"), help="folder for result and picture")
    add("--json", action="store_true", help="print the result as JSON instead of a table")
    add("--worker", choices=list(ATTENTIONS), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--flash-scale-factor", type=float, default=1.0, help=argparse.SUPPRESS)  # test hook
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    for name, (gpu, cpu) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    size = len(load_text(args.data))
    if args.seqlen >= size:
        parser.error(f"--seqlen {args.seqlen}: expected less than the text's {size} bytes")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; leave the option out to use the CPU")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.worker:
        result = train(args.worker, args, args.folder)
        (args.folder / f"{args.worker}.json").write_text(json.dumps(result))
        return 0
    names = RUNS.get(args.attention, [args.attention])
    if "flash" in names and importlib.util.find_spec("flash_attn") is None:
        sys.exit("flash_attn is not installed: run `pip install .` in the source tree first")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = {name: run(name, argv, folder) for name in names}
        if "flash" in runs and not runs["flash"]["fits"]:
            sys.exit(f"the flash run does not fit: {runs['flash']['reason']}")
        both = {"flash", "standard"} <= set(names)
        gradient = check_gradients(args, folder) if both else None
        finished = [name for name in names if runs[name]["fits"]]
        sample = sample_text(finished[0], args, folder) if finished else ""
    threads = f"{torch.get_num_threads()} CPU threads"
    result = {
        "options": {key: getattr(args, key) for key in SHOWN_OPTIONS},
        "where": torch.cuda.get_device_name() if args.device == "cuda" else threads,
        "runs": runs,
        "differences": compare(runs, gradient, args.dtype),
        "sample": sample,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    picture = plot(result, args.out / "train_gpt.png")
    if args.json:
        print(json.dumps(result))
    else:
        print(f"\n{table(result)}\n{picture}")
        if finished:
            print(f"\nsample of {finished[0]}:\n{sample}")
    return 1 if result["differences"]["parted"] else 0


def sample_text(name: str, args: argparse.Namespace, folder: Path) -> str:
    model = new_model(name, args)
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
        return model.sample(b"The ", args.sample_bytes).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
