"""`python -m flash_attn.verify` says what is true, also where results are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import on_devices

from flash_attn import flash_attn_func, verify

SMALL = ["--batch", "1", "--seqlen", "70", "--heads", "2", "--head-dim", "16", "--repeats", "1"]
OPTIONS = {
    "plain": [],
    "causal": ["--causal", "--seqlen-k", "40", "--heads-k", "1"],
    "window": ["--window", "9", "4", "--dtype", "bfloat16"],
    "all": ["--causal", "--softcap", "5", "--alibi", "--sink", "--dropout", "0.2"],
    "half": ["--dtype", "float16", "--sink", "--dropout", "0.4"],
}


@on_devices
@pytest.mark.parametrize("name", OPTIONS)
def test_results_match(name: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, *OPTIONS[name], "--device", device, "--json"]
    assert verify.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["out", "softmax_lse", "dq", "dk", "dv", *(["dsink"] if "--sink" in arguments else [])]
    assert [check["name"] for check in result["checks"]] == names
    assert result["matches"] and all(check["matches"] for check in result["checks"])
    assert result["problem"]["device"] == device and result["problem"]["batch"] == 1
    assert set(result["costs"]) == {"tiled", "standard"}
    assert all(cost["ms"] > 0 and cost["peak_bytes"] >= 0 for cost in result["costs"].values())


def scaled(factor: float) -> Any:
    def wrong(*tensors: torch.Tensor, **options: Any) -> Any:
        out, softmax_lse = flash_attn_func(*tensors, **options)
        return out * factor, softmax_lse

    return wrong


@pytest.mark.parametrize("factor", [1.0 + 1e-3, float("nan")])
def test_wrong_results_are_told(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "flash_attn_func", scaled(factor))
    assert verify.main(SMALL) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        line.split()[0]: line.split()[-1] for line in lines if line.endswith(("ok", "WRONG"))
    }
    assert verdicts["out"] == verdicts["dq"] == "WRONG" and verdicts["softmax_lse"] == "ok"


def test_what_cannot_be_checked_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*SMALL, "--head-dim", "300"]) == 2
    assert capsys.readouterr().err.startswith(
        "nothing verified: q: expected head_dim from 1 to 256"
    )


def test_as_a_program(tmp_path: Path) -> None:
    """With a table and a picture."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "errors.png"
    command = [
        sys.executable,
        "-m",
        "flash_attn.verify",
        *SMALL,
        "--causal",
        "--plot",
        str(picture),
    ]
    root = str(Path(verify.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines() if line]
    assert [line[0] for line in words if line[-1] == "ok"] == [
        "out",
        "softmax_lse",
        "dq",
        "dk",
        "dv",
    ]
    assert [line[0] for line in words if line[0] in ("tiled", "standard")] == ["tiled", "standard"]
    assert picture.read_bytes().startswith(b"\x89PNG")
