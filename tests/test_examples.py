"""The example that trains a GPT: what it measures, and that it notices when the runs part."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples"
SMALL = "--device cpu --seqlen 48 --batch 2 --steps 6 --layers 2 --heads 2 --head-dim 16".split()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module examples/train_gpt.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import train_gpt

    return train_gpt


def run_example(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "train_gpt.py"), *SMALL, "--out", str(out), *options]
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("example")
    result = run_example(out, "--attention", "all", "--json", "--sample-bytes", "12")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), out


def test_runs_agree_and_learn(finished: tuple[dict[str, Any], Path]) -> None:
    result, _ = finished
    assert list(result["runs"]) == ["flash", "sdpa", "standard"]
    for run in result["runs"].values():
        assert len(run["losses"]) == 6
        assert run["losses"][0] == pytest.approx(math.log(256), abs=0.2)  # knows nothing yet
        assert run["losses"][-1] < run["losses"][0] - 0.5
        assert run["tokens_per_second"] == pytest.approx(2 * 48 / run["step_seconds"])
        assert run["peak_bytes"] > 0
    differences = result["differences"]
    assert set(differences["loss"]) == {"sdpa", "standard"}
    assert max(differences["loss"].values()) < 1e-4
    assert differences["gradient"]["relative"] < 1e-5
    assert differences["parted"] == []


def test_result_picture_and_sample_are_written(finished: tuple[dict[str, Any], Path]) -> None:
    result, out = finished
    assert json.loads((out / "result.json").read_text()) == result
    assert result["sample"].startswith("The ")
    pytest.importorskip("matplotlib")
    assert (out / "train_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_scale_fails_the_run(tmp_path: Path) -> None:
    result = run_example(tmp_path, "--flash-scale-factor", "1.05", "--sample-bytes", "0")
    assert result.returncode == 1, result.stderr
    assert "PARTED: the gradients of flash and standard differ" in result.stdout


def test_text_of_ones_own_is_used(tmp_path: Path) -> None:
    data = tmp_path / "text"
    data.write_bytes(b"ab" * 100)
    result = run_example(
        tmp_path, "--attention", "flash", "--data", str(data), "--steps", "40", "--lr", "0.02"
    )
    assert result.returncode == 0, result.stderr
    assert "abababababab" in result.stdout.split("sample of flash:")[1]
    result = run_example(tmp_path, "--data", str(data), "--seqlen", "200")
    assert result.returncode == 2
    assert "expected less than the text's 200 bytes" in result.stderr


def options(**changes: Any) -> SimpleNamespace:
    sizes = {"seqlen": 32, "batch": 2, "steps": 3, "layers": 1, "heads": 2, "head_dim": 8}
    rest = {"device": "cpu", "dtype": "fp32", "seed": 0, "data": None, "lr": None}
    return SimpleNamespace(**{**sizes, **rest, "flash_scale_factor": 1.0, **changes})


def refuse_long(example: Any, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Standard attention runs out of memory above `limit` tokens of a batch."""
    whole = example.loss_of

    def limited(model: Any, tokens: torch.Tensor, args: Any) -> torch.Tensor:
        is_standard = model.blocks[0].attention.__qualname__.startswith("standard")
        if is_standard and tokens.numel() > limit:
            raise torch.OutOfMemoryError("out of memory\nmore about it")
        return whole(model, tokens, args)

    monkeypatch.setattr(example, "loss_of", limited)


def test_what_does_not_fit_is_a_result(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse_long(example, monkeypatch, limit=20)
    assert example.train("flash", options(), tmp_path)["fits"]
    run = example.train("standard", options(), tmp_path)
    assert run == {"fits": False, "reason": "out of memory"}

    runs = {"flash": {"fits": True, "losses": [1.0]}, "standard": run}
    assert example.compare(runs, None, "fp32")["parted"] == []


def test_gradients_are_checked_on_what_fits(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse_long(example, monkeypatch, limit=20)
    example.train("flash", options(), tmp_path)
    check = example.check_gradients(options(), tmp_path)
    assert (check["batch"], check["seqlen"]) == (1, 16)
    assert check["relative"] < 1e-5


def test_errors_other_than_memory_are_raised(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(example, "loss_of", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        example.train("flash", options(), tmp_path)


@pytest.mark.parametrize("bad", [1.5, math.nan])
def test_losses_that_part_are_named(example: Any, bad: float) -> None:
    runs = {
        "flash": {"fits": True, "losses": [3.0, bad]},
        "standard": {"fits": True, "losses": [3.0, 1.0]},
    }
    (sentence,) = example.compare(runs, None, "bf16")["parted"]
    assert "flash and standard" in sentence


def test_one_step_apart_is_enough_in_fp32(example: Any) -> None:
    runs = {
        "flash": {"fits": True, "losses": [3.0] * 99 + [1.002]},
        "standard": {"fits": True, "losses": [3.0] * 99 + [1.0]},
    }
    (sentence,) = example.compare(runs, None, "fp32")["parted"]
    assert "0.002 nats at a step" in sentence
    assert example.compare(runs, None, "bf16")["parted"] == []


def test_gradients_that_part_are_named(example: Any) -> None:
    check = {"relative": math.nan, "parameter": "head.weight", "step": 0}
    (sentence,) = example.compare({}, check, "fp32")["parted"]
    assert "head.weight" in sentence


def test_batches_depend_on_seed_and_step_only(example: Any) -> None:
    text = example.load_text(None)
    first = example.batch_at(3, text, options())
    assert first.shape == (2, 33)
    assert torch.equal(first, example.batch_at(3, text, options(attention="sdpa")))
    assert not torch.equal(first, example.batch_at(4, text, options()))
    assert not torch.equal(first, example.batch_at(3, text, options(seed=1)))


def test_peak_memory_sees_what_is_gone_again(example: Any) -> None:
    memory = example.PeakMemory("cpu")
    size = 2**26
    torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < memory.bytes() < 3 * size


def test_progress_without_tqdm(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(example.progress(20, "flash")) == list(range(20))
    assert "flash: step 18 of 20" in capsys.readouterr().err


def test_no_picture_without_matplotlib(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in example.plot({}, tmp_path / "picture.png")
