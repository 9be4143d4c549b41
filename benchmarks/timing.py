"""Clocks, interleaved rounds, and the two rates that bound every kernel on the machine at hand."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
Selected = Mapping[str, Callable[[], AbstractContextManager[None]]]  # entered around many calls

MOST_ITERATIONS = 200  # in one round
FEWEST_ROUNDS = 5  # fewer do not tell how much the times scatter
ENOUGH = 0.005  # relative standard error of every median at which no more rounds are timed


class Clock(Protocol):
    def ms(self, call: Call, iterations: int) -> float:
        """Mean milliseconds of a call over `iterations` of them."""


class CudaClock:
    """Time on the GPU between two events, without that of the host until the first launch."""

    HEAD_START = 2_000_000  # clocks, about a millisecond, that the GPU is kept busy meanwhile

    def ms(self, call: Call, iterations: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(self.HEAD_START)
        start.record()
        for _ in range(iterations):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / iterations


class WallClock:
    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now  # time.process_time: what all threads of this process computed

    def ms(self, call: Call, iterations: int) -> float:
        start = self.now()
        for _ in range(iterations):
            call()
        return 1e3 * (self.now() - start) / iterations


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else WallClock()


def relative_error(times: Sequence[float]) -> float:
    """Standard error of the median, from the quartiles so that stray rounds do not count."""
    low, median, high = statistics.quantiles(times, n=4)
    deviation = (high - low) / 1.35  # of a normal distribution with these quartiles
    return 1.25 * deviation / (len(times) ** 0.5 * median)


def interleaved(
    calls: Mapping[str, Call],
    clock: Clock,
    selected: Selected | None = None,
    *,
    rounds: int,
    target_ms: float,
) -> dict[str, float]:
    """Median milliseconds of every call.

    Each round times all of them, in random order so that none always follows the one that heats
    the machine most, and as often as fits in `target_ms`. At most `rounds`; fewer where the times
    scatter so little that every median is known to ENOUGH.
    """

    def ms(name: str, iterations: int) -> float:
        with selected[name]() if selected else nullcontext():
            return clock.ms(calls[name], iterations)

    iterations = {}
    for name in calls:
        ms(name, 1)  # the first call may compile or plan
        once = max(ms(name, 1), 1e-4)
        iterations[name] = max(1, min(MOST_ITERATIONS, int(target_ms / once)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(1, rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(ms(name, iterations[name]))
        if done >= FEWEST_ROUNDS and all(relative_error(t) < ENOUGH for t in times.values()):
            break
    return {name: statistics.median(measured) for name, measured in times.items()}


@dataclass(frozen=True)
class Roofline:
    """What the machine reaches on a large matrix product and on a large copy, in the same run."""

    flop_per_ms: float
    bytes_per_ms: float

    def least_ms(self, flop: float, least_bytes: int) -> float:
        return max(flop / self.flop_per_ms, least_bytes / self.bytes_per_ms)


def measure_roofline(device: str, dtype: torch.dtype, clock: Clock) -> Roofline:
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if device == "cuda" else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    ms = interleaved(calls, clock, rounds=15, target_ms=20.0)
    return Roofline(2.0 * size**3 / ms["matmul"], 2.0 * source.numel() / ms["copy"])
