"""Random problems, and laws of attention that hold between calls."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_inputs
from compare import check_case

from flash_attn import flash_attn_func

pytest.importorskip("hypothesis")  # test_environment.py sees to it that CI has it
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# Not random from run to run: what fails here fails for everyone.
bounded = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)

window_bounds = st.one_of(st.just(-1), st.integers(0, 90))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads_k = draw(st.integers(1, 3))
    return Case(
        "random",
        batch=draw(st.integers(1, 3)),
        seqlen_q=draw(st.integers(0, 140)),
        seqlen_k=draw(st.integers(0, 140)),
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=draw(st.one_of(st.integers(1, 32), st.sampled_from([40, 64, 96, 128]))),
        causal=draw(st.booleans()),
        window=draw(st.tuples(window_bounds, window_bounds)),
        scale=draw(st.one_of(st.none(), st.floats(-1.0, 1.0, width=16))),
        layout=draw(
            st.sampled_from(["bshd", "bhsd", "sbhd", "interleaved", "wide", "shifted", "expanded"])
        ),
    )


@bounded
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_problem(case: Case, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)  # what fails can be run again alone
    check_case(case, dtype)


@bounded
@given(case=cases(), cut=st.floats(0, 1))
def test_parts_of_the_keys_merge_by_their_lse(case: Case, cut: float) -> None:
    """softmax over all keys = the parts' outputs weighted by exp(lse of the part - lse of all)."""
    q, k, v = (tensor.detach() for tensor in make_inputs(case, torch.float32))
    middle = round(cut * case.seqlen_k)
    options = {"softmax_scale": case.scale, "return_attn_probs": True}
    out, lse, _ = flash_attn_func(q, k, v, **options)
    merged = torch.zeros_like(out)
    for part in (slice(0, middle), slice(middle, None)):
        part_out, part_lse, _ = flash_attn_func(q, k[:, part], v[:, part], **options)
        if part_lse.isfinite().all():  # a part without keys has no weight
            merged += part_out * (part_lse - lse).exp().transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)


@bounded
@given(case=cases(), seed=st.integers(0, 2**16))
def test_order_of_keys_does_not_matter_without_mask(case: Case, seed: int) -> None:
    q, k, v = (tensor.detach() for tensor in make_inputs(case, torch.float32))
    order = torch.randperm(case.seqlen_k, generator=torch.Generator().manual_seed(seed))
    out = flash_attn_func(q, k, v)
    torch.testing.assert_close(
        flash_attn_func(q, k[:, order], v[:, order]), out, rtol=1e-5, atol=1e-5
    )


@bounded
@given(case=cases())
def test_masked_keys_have_no_influence(case: Case) -> None:
    """Bits of the first rows stay the same when keys they don't see hold something else."""
    q, k, v = (tensor.detach().clone() for tensor in make_inputs(case, torch.float32))
    rows = case.seqlen_q // 2
    out = flash_attn_func(q, k, v, causal=True)
    unseen = max(0, rows + case.seqlen_k - case.seqlen_q)
    k[:, unseen:] = 3.0
    v[:, unseen:] = 1000.0
    changed = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(changed[:, :rows], out[:, :rows])


@bounded
@given(case=cases())
def test_output_is_an_average_of_visible_values(case: Case) -> None:
    """With all values equal the output is that value, or 0 where no key is visible."""
    q, k, v = (tensor.detach() for tensor in make_inputs(case, torch.float32))
    options = {"causal": case.causal, "window_size": case.window, "return_attn_probs": True}
    out, lse, _ = flash_attn_func(q, k, torch.full_like(v, 1.5), **options)
    expected = torch.where(lse.isfinite(), 1.5, 0.0).transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(out, expected.expand_as(out), rtol=1e-5, atol=0)
