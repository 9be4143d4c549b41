"""What tests/smoke.py asks of installed wheels holds for this build, on every device."""

from __future__ import annotations

import pytest
import smoke
import torch
from backends import on_devices, usual_dtype


@on_devices
def test_a_training_step(device: str) -> None:
    smoke.training_step(device, usual_dtype(device))


@on_devices
@pytest.mark.parametrize("check", [smoke.check_dense, smoke.check_varlen, smoke.check_kvcache])
def test_results(check: smoke.Check, device: str) -> None:
    check(device, usual_dtype(device))


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = smoke.flash_attn_varlen_func
    monkeypatch.setattr(
        smoke, "flash_attn_varlen_func", lambda *a, **options: attend(*a, **options) * 1.1
    )
    with pytest.raises(AssertionError, match="out: expected an error up to"):
        smoke.check_varlen("cpu", torch.float32)
