"""Benchmarks of packed sequences and of options: what is timed, by whom, and how it is checked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
from flash_attn.reference import visible_keys

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
LENGTHS = (40, 90, 1, 33)


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def packed_problem(**changes: Any) -> Any:
    from problems import packed

    return replace(packed(list(LENGTHS), 4, 32), num_heads_k=2, **changes)


def option_problem(**changes: Any) -> Any:
    from problems import Problem

    return replace(Problem(2, 640, 640, 4, 2, 32, causal=True), **changes)


def error_of(contender: Any, problem: Any, pass_name: str = "bwd") -> float:
    """As a row of the table has it."""
    from bench_attention import prepare
    from checks import largest_error, sampled_references

    tensors = problem.tensors("cpu", torch.float32)
    references = sampled_references(problem, *tensors)
    with contender.selected():
        _, results = prepare(contender, pass_name, tensors, problem)
    assert set(results) == ({"out"} if pass_name == "fwd" else {"out", "dq", "dk", "dv"})
    return largest_error(problem, results, references)


@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (False, (7, 0)), (True, (9, 9))]
)
def test_costs_of_packed_sequences(causal: bool, window: tuple[int, int]) -> None:
    problem = packed_problem(causal=causal, window=window)
    seen = [int(visible_keys(length, length, causal, window).sum()) for length in LENGTHS]
    if window == (-1, -1):  # half of all pairs counts as causal
        seen = [length * length / (1 + causal) for length in LENGTHS]
    assert problem.flop("fwd") == 2 * 4 * sum(seen) * (32 + 32)
    q, k, v, dout = problem.tensors("cpu", torch.float16)
    assert q.shape == dout.shape == (164, 4, 32) and k.shape == v.shape == (164, 2, 32)
    assert problem.least_bytes("fwd", 2) == sum(2 * x.numel() for x in (q, k, v, dout))


def test_names_say_what_is_timed() -> None:
    from problems import grid, packed

    assert packed([1024] * 16, 16, 128).name() == "packed 16x1024 h16 d128"
    assert packed([512] + [2] * 9, 8, 64).name() == "packed 512+9x2 h8 d64"
    assert packed_problem(causal=True).name() == "packed 4x1..90 h4/2 d32 causal"
    changes = dict(softcap=30.0, dropout_p=0.1, alibi=True, sink=True)
    assert option_problem(**changes).name().endswith(" causal softcap30 dropout0.1 alibi sink")
    for name in ("varlen", "options"):
        names = [problem.name() for problem in grid([name], [False, True])]
        assert len(set(names)) == len(names)


def test_grids_of_packed_sequences_and_options() -> None:
    from problems import grid

    packed = grid(["varlen"], [False, True])
    assert len(packed) == 2 * 2 * 4 and sum(problem.causal for problem in packed) == 8
    assert {problem.seqlens[0] for problem in packed if len(problem.seqlens) == 65} == {16384}
    at_random = {problem.seqlens for problem in packed if len(problem.seqlens) == 512}
    assert len(at_random) == 1  # for every head dimension and mask, and in every run
    (lengths,) = at_random
    assert (sum(lengths), min(lengths) >= 1, max(lengths) <= 2048) == (506143, True, True)
    options = grid(["options"], [False, True])
    assert len(options) == 2 * 6
    assert all(problem.causal or problem.window == (1023, 0) for problem in options)


def test_a_problem_comes_back_from_json() -> None:
    from problems import Problem

    for problem in (packed_problem(window=(3, 0)), option_problem(softcap=2.0, sink=True)):
        assert Problem.from_json(json.loads(json.dumps(asdict(problem)))) == problem


OPTIONS = [
    {},
    {"softcap": 30.0},
    {"alibi": True},
    {"sink": True},
    {"softcap": 5.0, "alibi": True, "sink": True, "window": (50, 3), "causal": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [packed_problem, option_problem])
def test_ours_is_right(make: Callable[..., Any], options: dict[str, Any]) -> None:
    from checks import ERROR_BOUND
    from contenders import ours

    problem = make(**options)
    for pass_name in ("fwd", "bwd"):
        assert error_of(ours(), problem, pass_name) < ERROR_BOUND[torch.float32]


@pytest.mark.parametrize("options", [*OPTIONS[1:4], {"window": (50, 0)}], ids=str)
def test_who_leaves_an_option_out_is_wrong(options: dict[str, Any]) -> None:
    from checks import ERROR_BOUND
    from contenders import Contender, ours

    def without(q: Tensor, k: Tensor, v: Tensor, problem: Any) -> Tensor:
        plain = replace(problem, softcap=0.0, alibi=False, sink=False, window=(-1, -1))
        return ours()(q, k, v, plain)

    assert error_of(Contender(without), option_problem(**options)) > ERROR_BOUND[torch.bfloat16]


def test_who_takes_packed_sequences_for_one_is_wrong() -> None:
    from checks import ERROR_BOUND
    from contenders import Contender, ours

    def as_one(q: Tensor, k: Tensor, v: Tensor, problem: Any) -> Tensor:
        return ours()(q, k, v, replace(problem, seqlens=(sum(problem.seqlens),)))

    assert error_of(Contender(as_one), packed_problem()) > ERROR_BOUND[torch.bfloat16]


def test_dense_takes_equal_lengths_only() -> None:
    from checks import ERROR_BOUND
    from contenders import CONTENDERS
    from problems import packed

    dense = CONTENDERS["dense"]()
    assert error_of(dense, packed([50] * 3, 2, 32)) < ERROR_BOUND[torch.float32]
    for problem in (packed_problem(), option_problem()):
        with pytest.raises(NotImplementedError, match="of equal lengths"):
            dense(*problem.tensors("cpu", torch.float32)[:3], problem)


def test_with_dropout_the_average_and_the_scatter_are_checked() -> None:
    from checks import DROPOUT_BOUND, error_bound
    from contenders import Contender, ours, sdpa

    sizes = dict(batch_size=1, seqlen_q=2048, seqlen_k=2048)
    problem = replace(option_problem(dropout_p=0.1), **sizes)
    assert error_bound(problem, torch.bfloat16) == DROPOUT_BOUND
    assert error_of(ours(), problem) < DROPOUT_BOUND
    assert error_of(sdpa(), replace(problem, num_heads_k=4)) < DROPOUT_BOUND

    def changed(factor: float, **changes: Any) -> Contender:
        return Contender(lambda q, k, v, p: factor * ours()(q, k, v, replace(p, **changes)))

    for wrong in (
        changed(1.0, dropout_p=0.0),
        changed(0.9),  # not scaled by 1 / (1 - p)
        changed(1.0, dropout_p=0.2),
        changed(1.0, causal=False),
        changed(math.nan),
    ):
        assert not error_of(wrong, problem) <= DROPOUT_BOUND


def test_what_a_contender_does_not_know_it_refuses() -> None:
    from contenders import refuse

    unknown = [
        ({"window": (5, 0)}, "no windows"),
        ({"softcap": 3.0}, "no softcap"),
        ({"alibi": True}, "no alibi"),
        ({"dropout_p": 0.5}, "no dropout_p"),
        ({"sink": True}, "no sink"),
    ]
    for options, reason in unknown:
        with pytest.raises(NotImplementedError, match=reason):
            refuse(option_problem(**options), knows=(), packed=False, window=False)
    with pytest.raises(NotImplementedError, match="no packed sequences"):
        refuse(packed_problem(), knows=("sink",), packed=False, window=True)
    refuse(packed_problem(sink=True, window=(5, 0)), knows=("sink",), packed=True, window=True)


def test_fa2_by_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the op is called as its schema says; a GPU has the op itself."""
    from checks import ERROR_BOUND
    from contenders import CONTENDERS, Contender

    def stand_in(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert dropout_p == 0.0 and not return_debug_mask
        options = dict(
            causal=is_causal,
            window_size=(window_size_left, window_size_right),
        )
        if cum_seq_q is None or cum_seq_k is None:
            assert (max_q, max_k) == (q.size(1), k.size(1))
            return flash_attn.flash_attn_func(q, k, v, **options), q, q, q, q
        assert cum_seq_q.tolist() == cum_seq_k.tolist() == [0, 40, 130, 131, 164]
        assert (max_q, max_k) == (90, 90)
        borders = (cum_seq_q, cum_seq_k)
        out = flash_attn.flash_attn_varlen_func(q, k, v, *borders, max_q, max_k, **options)
        return out, q, q, q, q

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in)
    fa2 = Contender(CONTENDERS["fa2"]().attention)  # not selected, for the stand-in's attention
    bound = ERROR_BOUND[torch.float32]
    dense = option_problem(seqlen_q=40, seqlen_k=60, causal=False)
    assert error_of(fa2, packed_problem(causal=True), "fwd") < bound
    assert error_of(fa2, replace(dense, window=(5, 0)), "fwd") < bound
    assert error_of(fa2, replace(dense, window=(5, 0)), "bwd") < bound
    with pytest.raises(NotImplementedError, match="no alibi"):
        error_of(fa2, replace(dense, alibi=True), "fwd")


def test_fa3_gets_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from checks import ERROR_BOUND
    from contenders import CONTENDERS

    monkeypatch.setitem(
        sys.modules,
        "peer_fa3",
        SimpleNamespace(
            flash_attn_func=flash_attn.flash_attn_func,
            flash_attn_varlen_func=flash_attn.flash_attn_varlen_func,
        ),
    )
    fa3 = CONTENDERS["fa3"]()
    for problem in (packed_problem(causal=True), option_problem(softcap=30.0, window=(50, 0))):
        assert error_of(fa3, problem) < ERROR_BOUND[torch.float32]
    problem = option_problem(sink=True)
    with pytest.raises(NotImplementedError, match="no sink"):
        fa3(*problem.tensors("cpu", torch.float32)[:3], problem)


def test_contenders_go_by_the_grid() -> None:
    from bench_attention import default_contenders
    from contenders import CONTENDERS

    assert default_contenders(["varlen"], True) == ["ours", "sm80", "dense", "fa2", "fa3"]
    both = default_contenders(["options", "paper"], True)
    assert both == ["ours", "sm80", "fa2", "fa3", "cudnn"]
    assert default_contenders(["varlen"], False) == ["ours", "sdpa"]
    assert set(both) < set(CONTENDERS)
