"""The arithmetic of the benchmarks, their check of results, and a small run of each on CPU."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_attn.reference import visible_keys

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


class FakeClock:
    """Takes the time that a call returns for the call's time."""

    def __init__(self) -> None:
        self.calls = 0

    def ms(self, call: Any, iterations: int) -> float:
        self.calls += iterations
        return float(call())


def run_script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(FOLDER / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_costs_of_a_problem() -> None:
    from problems import Problem

    problem = Problem(2, 100, 200, 8, 2, 64)
    pairs = sum(2 * 100 * 200 * 64 for _ in range(2 * 8))  # of one product, by batch and head
    assert problem.flop("fwd") == 2 * pairs
    assert problem.flop("bwd") == 5 * pairs
    assert Problem(2, 100, 200, 8, 2, 64, causal=True).flop("fwd") == pairs
    q, k, v, dout = problem.tensors("cpu", torch.float16)
    forward = [q, k, v, dout]  # out is like dout
    assert problem.least_bytes("fwd", 2) == sum(2 * x.numel() for x in forward)
    backward = [q, k, v, dout, dout, q, k, v]  # out and dout in, gradients out
    assert problem.least_bytes("bwd", 2) == sum(2 * x.numel() for x in backward)


def test_paper_grid_keeps_tokens_and_width() -> None:
    from problems import grid

    problems = grid(["paper"], [False, True])
    assert len(set(problems)) == 36
    for problem in problems:
        assert problem.batch_size * problem.seqlen_q == 16384
        assert problem.num_heads * problem.head_dim == 2048
    assert sum(problem.causal for problem in problems) == 18


MASKS = [(False, (-1, -1)), (True, (-1, -1)), (False, (3, 5)), (True, (4, 4)), (False, (-1, 2))]


@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_visible_pairs_of_a_window(causal: bool, window: tuple[int, int]) -> None:
    from problems import Problem

    problem = Problem(1, 20, 31, 1, 1, 8, causal=causal, window=window)
    pairs = int(visible_keys(20, 31, causal, window).sum())
    if window == (-1, -1):  # half of all pairs counts as causal
        pairs = 20 * 31 // (1 + causal)
    assert problem.visible_pairs() == pairs
    assert problem.flop("fwd") == 2 * pairs * (8 + 8)


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("rows", [5, 64])
def test_reference_is_what_autograd_gives(causal: bool, window: tuple[int, int], rows: int) -> None:
    from checks import reference
    from problems import Problem

    q, k, v, dout = (torch.randn(24, *rest) for rest in ((3, 16), (16,), (8,), (3, 8)))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    heads = [x.unsqueeze(1).expand(-1, 3, -1) if x.dim() == 2 else x for x in inputs]
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in heads), attn_mask=visible_keys(24, 24, causal, window)
    ).transpose(0, 1)
    out.backward(dout)
    problem = Problem(1, 24, 24, 3, 1, 16, causal=causal, window=window, head_dim_v=8)
    result = reference(q, k, v, dout, problem, rows=rows)
    for got, want in zip(result.values(), (out, *(x.grad for x in inputs)), strict=True):
        torch.testing.assert_close(got, want)


def test_interleaved_medians_and_bounds() -> None:
    from timing import MOST_ITERATIONS, interleaved

    slow = iter([0.0, 9.0, *([5.0] * 3), 100.0, 5.0, 5.0])  # warm-up, estimate, rounds
    calls = {"slow": lambda: next(slow), "fast": lambda: 1e-6}
    clock = FakeClock()
    assert interleaved(calls, clock, rounds=5, target_ms=10.0) == {"slow": 5.0, "fast": 1e-6}
    assert clock.calls == 2 + 5 + 2 + 5 * MOST_ITERATIONS


@pytest.mark.parametrize(
    ("times", "rounds"), [([3.0] * 20, 5), ([3.0, 4.0] * 10, 12), ([3.0, 9.0, *[3.0] * 18], 7)]
)
def test_rounds_end_when_the_median_is_known(times: list[float], rounds: int) -> None:
    from timing import interleaved

    clock = FakeClock()
    of_calls = iter([0.0, 100.0, *times])
    interleaved({"one": lambda: next(of_calls)}, clock, rounds=12, target_ms=1.0)
    assert clock.calls == 2 + rounds


def test_calls_are_made_inside_of_the_selected_context() -> None:
    from contextlib import contextmanager

    from timing import interleaved

    inside = []

    @contextmanager
    def selected():
        inside.append(True)
        yield
        inside.pop()

    def call() -> float:
        assert inside
        return 1.0

    interleaved({"one": call}, FakeClock(), {"one": selected}, rounds=5, target_ms=1.0)
    assert not inside


def test_roofline_is_the_slower_bound() -> None:
    from timing import Roofline

    roofline = Roofline(flop_per_ms=100.0, bytes_per_ms=10.0)
    assert roofline.least_ms(1000.0, 50) == 10.0
    assert roofline.least_ms(100.0, 50) == 5.0


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "pass": "fwd",
        "name": "1x64 h2 d32",
        "problem": {"head_dim": 32, "causal": False, "seqlen_q": 64},
        "tflops": {"ours": 300.0, "fa2": 150.0, "cudnn": 400.0},
        "ms": {"ours": 2.0, "fa2": 4.0, "cudnn": 1.5},
        "least_ms": 1.0,
        "errors": {"ours": 2e-3, "fa2": 2e-3, "cudnn": 2e-3},
        "wrong": [],
        "failures": {},
    }
    return base | changes


def result_of(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {
        "where": "a machine",
        "torch": "2.10",
        "dtype": "bfloat16",
        "contenders": ["ours", "fa2", "cudnn"],
        "without": {},
        "roofline": {"flop_per_ms": 7e11, "bytes_per_ms": 3e9},
        "rows": list(rows),
        "stopped": False,
    }
    return base | changes


def test_ratios_of_a_row() -> None:
    from tables import BEST, best_other, ratio, roofline_share, row_text

    assert best_other(row()) == "cudnn"
    assert ratio(row(), BEST) == ratio(row(), "cudnn") == 0.75
    assert ratio(row(), "fa3") is None
    assert ratio(row(), "fa2") == 2.0
    assert roofline_share(row()) == 0.5
    text = row_text(row(), ["ours", "fa2", "cudnn", "fa3"])
    assert text.split() == "fwd 1x64 h2 d32 300 150 400 - | 2.00 0.75 - 0.75 50% 2e-03".split()


def test_a_wrong_contender_is_no_bar_and_is_named() -> None:
    from tables import best_other, row_text, summary

    wrong = row(wrong=["cudnn"])
    assert best_other(wrong) == "fa2"
    assert "WRONG: cudnn" in row_text(wrong, ["ours", "fa2", "cudnn"])
    assert "WRONG results from cudnn" in summary(result_of(wrong))


def test_summary_has_geometric_means_minima_and_reasons() -> None:
    from tables import summary

    better = row(tflops={"ours": 400.0, "fa2": 50.0}, failures={"cudnn": "RuntimeError: no plan"})
    lines = list(summary(result_of(row(), better, without={"fa3": "ImportError: none"})))
    fa2, best = math.sqrt(2.0 * 8), math.sqrt(0.75 * 8)
    expected = f"fwd all 2 {fa2:.3f} (2.00) 0.750 (0.75) {best:.3f} (0.75) 50%"
    assert expected.split() in [line.split() for line in lines]
    assert "least fwd over best: 0.75 at 1x64 h2 d32" in lines
    assert "no figure, cudnn: RuntimeError: no plan (1 rows)" in lines
    assert "without fa3: ImportError: none" in lines


def test_the_report_of_a_stopped_run_says_so() -> None:
    from tables import report

    assert report(result_of(row(), stopped=True)).splitlines()[-1].startswith("STOPPED")
    assert "STOPPED" not in report(result_of(row()))
    assert report(result_of(stopped=True))  # before the first row


def test_wrong_and_failing_contenders_are_found() -> None:
    from bench_attention import measure
    from checks import sampled_references
    from contenders import Contender, sdpa
    from problems import Problem
    from timing import Roofline, WallClock

    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\nlong explanation")

    right = sdpa()
    contenders = {
        "ours": right,
        "scaled": Contender(lambda q, k, v, problem: right(1.1 * q, k, v, problem)),
        "nan": Contender(lambda q, k, v, problem: right(q, k, v, problem) * math.nan),
        "fails": Contender(fails),
    }
    problem = Problem(1, 40, 40, 4, 2, 16, causal=True)
    tensors = problem.tensors("cpu", torch.float32)
    references = sampled_references(problem, *tensors)
    for pass_name in ("fwd", "bwd"):
        measured = measure(
            problem,
            pass_name,
            contenders,
            tensors,
            references,
            clock=WallClock(),
            roofline=Roofline(1.0, 1.0),
            rounds=1,
            target_ms=0.1,
        )
        assert measured["wrong"] == ["scaled", "nan"]
        assert measured["failures"] == {"fails": "RuntimeError: no kernel"}
        assert measured["errors"]["ours"] < 1e-5


def test_attention_side_by_side_on_cpu(tmp_path: Path) -> None:
    saved, prefix = tmp_path / "run.json", tmp_path / "run"
    options = "--device cpu --contenders ours,sdpa --grid tiny --dtype float32 --causal 1".split()
    result = run_script(
        "bench_attention.py", *options, "--target-ms", "1", "--rounds", "1", "--json", str(saved)
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(saved.read_text())["rows"]
    assert [(r["pass"], r["name"]) for r in rows] == [
        (pass_name, name)
        for name in ("1x64 h2/1 d32 causal", "2x40 h2 d16 causal")
        for pass_name in ("fwd", "bwd")
    ]
    assert all(set(r["tflops"]) == {"ours", "sdpa"} for r in rows)
    pytest.importorskip("matplotlib")
    again = run_script("bench_attention.py", "--from", str(saved), "--png", str(prefix))
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[1:] == result.stdout.splitlines()
    assert (tmp_path / "run-bwd.png").read_bytes().startswith(b"\x89PNG")


def test_torchs_attention_on_our_kernels_is_for_the_gpu() -> None:
    from contenders import load
    from problems import Problem

    contenders, why_not = load(["sdpa_ours"])
    assert why_not == {}
    problem = Problem(1, 40, 40, 4, 2, 16, causal=True)
    q, k, v, _ = problem.tensors("cpu", torch.float32)
    with contenders["sdpa_ours"].selected():
        assert torch.nn.attention.current_flash_attention_impl() == "flash_attn"
        with pytest.raises(NotImplementedError, match="of its own on CPU"):
            contenders["sdpa_ours"](q, k, v, problem)
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_unknown_names_are_refused() -> None:
    result = run_script("bench_attention.py", "--grid", "paper,nosuch")
    assert result.returncode == 2
    assert "--grid: expected names out of paper" in result.stderr


def test_host_time_on_cpu(tmp_path: Path) -> None:
    saved = tmp_path / "host.json"
    result = run_script(
        "host_time.py",
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--iterations",
        "5",
        "--json",
        str(saved),
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(saved.read_text())
    assert list(figures) == ["no grad", "forward with grad", "forward + backward"]
    assert all(1.0 < us < 1e6 for mode in figures.values() for us in mode.values())


def test_cpu_ratio_can_fail_the_run() -> None:
    options = "--seqlen 64 --heads 2 --heads-k 1 --head-dim 16 --dtypes float32 --rounds 1".split()
    result = run_script("bench_cpu.py", *options, "--target-ms", "1", "--most", "1000")
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    result = run_script("bench_cpu.py", *options, "--target-ms", "1", "--most", "0")
    assert result.returncode == 1, result.stderr


def test_builds_side_by_side() -> None:
    module = str(sys.modules["flash_attn._C"].__file__)
    options = "--device cpu --grid tiny --dtype float32 --causal 1 --rounds 2 --processes 1".split()
    result = run_script("compare_builds.py", module, module, *options, "--target-ms", "1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["fwd", "bwd", "fwd", "bwd"]
    assert re.fullmatch(r"bwd new / old: geometric mean \d\.\d{3}, most \d\.\d{3}", lines[-1])
    result = run_script("compare_builds.py", module, module, *options, "--most", "0")
    assert result.returncode == 1, result.stderr


def test_a_build_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no module")
    result = run_script("compare_builds.py", str(broken), str(broken), "--grid", "tiny")
    assert result.returncode == 1
    assert f"{broken} failed; its error is above" in result.stderr


def test_one_command_for_all_benchmarks() -> None:
    command = [sys.executable, "-m", "benchmarks"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=FOLDER.parent)
    assert shown.returncode == 0
    for option in ("--head-dims", "--most", "--heads-k", "--processes"):
        assert option in shown.stdout
    wrong = subprocess.run([*command, "nosuch"], capture_output=True, text=True, cwd=FOLDER.parent)
    assert wrong.returncode == 2
    assert "expected one of attention, sdpa, host, cpu, builds, got nosuch" in wrong.stdout
