"""`python -m flash_attn info --call | bench | memory`, and what importers make of the package."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import on_devices

import flash_attn
from flash_attn import cli, ops
from flash_attn.commands import bench, importers, memory
from flash_attn.commands.kernels import Target, named_target
from flash_attn.commands.peers import first_failure, peer_names
from flash_attn.verify import problem_of

SMALL = ["--batch", "1", "--heads", "2", "--head-dim", "16"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert cli.main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def needs_all_kernels() -> None:
    build = ops.build_info()
    if not {"80", "90"} <= set(build["cuda_archs"]) or build["kernels"]:
        pytest.skip("needs a build of every kernel for 80;90")


# options of the call, architecture: forward kernel, backward kernel
SERVED = {
    "hopper": ([], "90", "fwd/sm90/64/bf16", "bwd/sm90/64/bf16"),
    "fp16": (
        ["--head-dim", "120", "--dtype", "float16"],
        "90",
        "fwd/sm90/128/fp16",
        "bwd/sm90/128/fp16",
    ),
    "extras": (
        ["--head-dim", "192", "--dropout", "0.1"],
        "90",
        "fwd/sm90/192/bf16/extras",
        "bwd/sm80/192/bf16/extras",
    ),
    "ampere": (["--head-dim", "33"], "sm_80", "fwd/sm80/64/bf16", "bwd/sm80/64/bf16"),
    "ada": (["--head-dim", "256"], "8.9", "fwd/sm80/256/bf16", "bwd/sm80/256/bf16"),
    "later": (["--softcap", "9"], "120", "fwd/sm80/64/bf16/extras", "bwd/sm80/64/bf16/extras"),
    "packed": (["--packed", "--causal"], "90", "fwd/sm90/64/bf16", "bwd/sm90/64/bf16"),
}


@pytest.mark.parametrize("name", SERVED)
def test_the_kernel_of_a_call(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    needs_all_kernels()
    options, arch, *kernels = SERVED[name]
    result = run_json(capsys, "info", "--call", *options, "--arch", arch)
    chosen = [result["passes"][name] for name in ("forward", "backward")]
    assert [choice["kernel"]["name"] for choice in chosen] == kernels
    assert [choice["backend"] for choice in chosen] == [kernel.split("/")[1] for kernel in kernels]
    for choice in chosen:
        assert {choice["backend"], *choice["others"]} == {"cpu", "sm80", "sm90"}
        assert choice["kernel"]["smem_bytes"] <= result["target"]["smem_bytes"]


def test_the_tile_follows_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    needs_all_kernels()
    short = run_json(capsys, "info", "--call", "--seqlen", "128", "--arch", "90")
    long = run_json(capsys, "info", "--call", "--seqlen", "4096", "--arch", "90")
    tiles = [result["passes"]["forward"]["kernel"]["tile_m"] for result in (short, long)]
    assert tiles == [128, 192]


def test_reasons_against_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    needs_all_kernels()
    result = run_json(capsys, "info", "--call", "--alibi", "--head-dim", "256", "--arch", "90")
    passes = result["passes"]
    assert passes["forward"]["others"]["sm80"] == "sm90 is newer and serves it"
    assert passes["backward"]["others"]["sm90"] == (
        "it has no kernel with softcap, ALiBi or dropout at head dim 256, only up to 128"
    )
    result = run_json(capsys, "info", "--call", "--arch", "75", status=1)
    assert result["passes"]["forward"]["backend"] is None
    assert "8.0 or later" in result["passes"]["forward"]["others"]["sm80"]


def test_a_call_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "info", "--call", "--arch", "cpu", "--dropout", "0.5")
    assert result["problem"]["dtype"] == "float32"
    assert {choice["backend"] for choice in result["passes"].values()} == {"cpu"}
    assert cli.main(["info", "--call", "--arch", "cpu"]) == 0
    assert "forward     cpu: every dtype and head dim" in capsys.readouterr().out


def test_a_build_without_kernels_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build: ops.BuildInfo = {**ops.build_info(), "cuda_archs": [], "rows": []}
    monkeypatch.setattr(ops, "build_info", lambda: build)
    result = run_json(capsys, "info", "--call", "--arch", "90", status=1)
    others = result["passes"]["backward"]["others"]
    assert others["sm90"] == others["sm80"] == "it is not in this build (FLASH_ATTN_CUDA_ARCHS)"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--arch", "hopper"], "--arch: expected cpu or a compute capability like 90, got hopper"),
        (["--head-dim", "257"], "head_dim: expected 1 to 256, got 257"),
        (["--heads", "3", "--heads-k", "2"], "heads: expected a multiple of the 2 heads_k, got 3"),
        (["--seqlen", "0"], "seqlen: expected 1 or more, got 0"),
    ],
)
def test_wrong_calls(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", "--call", *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info", "--head-dim", "64"], "--head-dim: expected with --call"),
        (["memory", "--seqlen-k", "64"], "unrecognized arguments: --seqlen-k"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_wrong_options(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert expected in capsys.readouterr().err


def test_verify_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "verify", *SMALL, "--seqlen", "20", "--repeats", "1")
    assert result["matches"]


CALLS_ON_GPU = {
    "plain": {"causal": True},
    "extras": {"dropout_p": 0.1},
    "extras_192": {"dropout_p": 0.1, "head_dim": 192},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS_ON_GPU)
def test_the_kernel_that_runs_is_the_one_that_is_named(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(CALLS_ON_GPU[name])
    head_dim = options.pop("head_dim", 64)
    call = ["--seqlen", "300", "--head-dim", str(head_dim), "--device", "cuda"]
    call += ["--causal"] if "causal" in options else ["--dropout", "0.1"]
    passes = run_json(capsys, "info", "--call", *call)["passes"]
    shape = (2, 300, 4, head_dim)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    run = {
        "forward": lambda: flash_attn.flash_attn_func(q, k, v, **options),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), out),
    }
    out = run["forward"]()
    for pass_name, choice in passes.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run[pass_name]()
            torch.cuda.synchronize()
        ours = [event.name for event in profile.events() if f"{pass_name}_kernel" in event.name]
        assert ours and all(f"flash::{choice['backend']}::" in kernel for kernel in ours), ours


@pytest.mark.parametrize("command", ["verify", "bench", "memory"])
def test_a_picture_needs_matplotlib(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([command, *SMALL, "--plot", "none.png"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "pip install matplotlib" in output.err


# What importers make of it.


def verdict_of(name: str, version: str | None = flash_attn.__version__) -> importers.Verdict:
    (gate,) = (gate for gate in importers.GATES if gate.name == name)
    return importers.judge(gate, version, [])


@pytest.mark.parametrize("name", [gate.name for gate in importers.GATES])
def test_every_importer_takes_this_version(name: str) -> None:
    reasons = verdict_of(name).reasons
    assert reasons == [] or reasons == ["uses it only where PyTorch sees a GPU"]


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("Transformer Engine", "2.8.4", "before 2.8.4"),
        ("xformers", "2.9.0+1", "2.8.4 or older"),
        ("xformers", "2.7.0", "2.7.1 or newer"),
        ("axolotl", "2.8.4", "2.8.3 or older"),
    ],
)
def test_versions_outside_of_a_window(name: str, version: str, expected: str) -> None:
    (reason,) = verdict_of(name, version).reasons
    assert expected in reason and version in reason


def test_missing_names_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", lambda *args, **kwargs: None)
    reasons = verdict_of("SGLang").reasons
    assert reasons == [
        "passes return_attn_probs to flash_attn_varlen_func, which has no such parameter"
    ]
    monkeypatch.delattr(flash_attn, "flash_attn_varlen_func")
    assert verdict_of("diffusers").reasons == [
        "imports flash_attn.flash_attn_varlen_func, which is missing"
    ]


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert {verdict.accepts for verdict in importers.verdicts()} == {False}
    assert "no distribution flash-attn" in importers.verdicts()[0].text()


def test_the_report_has_the_importers(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "info")
    assert [verdict["name"] for verdict in report["importers"]] == [
        gate.name for gate in importers.GATES
    ]


# Time and memory.


@on_devices
def test_bench_times_every_backend(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", *SMALL, "--seqlen", "40", "--rounds", "1", "--device", device]
    timings = run_json(capsys, *arguments, "--causal")["timings"]
    assert list(timings) == ["flash_attn", *peer_names(device)]
    timed = {name: timing for name, timing in timings.items() if not timing["why_not"]}
    assert {"flash_attn", "sdpa flash", "sdpa math"} <= set(timed)
    for timing in timed.values():
        assert timing["difference"] < (1e-5 if device == "cpu" else 5e-2)
        assert set(timing["ms"]) == set(bench.PASSES) and min(timing["ms"].values()) > 0


def test_bench_of_a_mask_that_pytorch_has_to_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "times.png"
    arguments = ["bench", *SMALL, "--seqlen", "40", "--rounds", "1", "--device", "cpu"]
    result = run_json(capsys, *arguments, "--causal", "--seqlen-k", "60", "--plot", str(picture))
    for timing in result["timings"].values():
        assert timing["why_not"] == "" and timing["difference"] < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_says_what_pytorch_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", *SMALL, "--seqlen", "40", "--rounds", "1", "--device", "cpu"]
    assert cli.main([*arguments, "--softcap", "5"]) == 0
    text = capsys.readouterr().out
    assert "scaled_dot_product_attention has no softcap" in text
    assert "flash_attn  " in text


def test_failures_are_one_line() -> None:
    def fail() -> None:
        raise RuntimeError("first\nsecond")

    assert first_failure(fail) == "first"
    assert first_failure(lambda: None) == ""


@on_devices
def test_memory_grows_with_the_length_but_for_standard_attention(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory", "--seqlens", "512", "2048", "--heads", "2", "--device", device]
    result = run_json(capsys, *arguments)
    short, long = (row["peak_bytes"] for row in result["rows"])
    assert set(short) == set(long) == set(memory.ATTENTIONS)
    assert 2 < long["flash_attn"] / short["flash_attn"] < 6
    assert 11 < long["standard"] / short["standard"] < 21
    assert long["standard"] > 5 * long["flash_attn"]


def test_memory_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    arguments = ["memory", *SMALL, "--seqlens", "512", "--device", "cpu", "--plot", str(picture)]
    assert cli.main(arguments) == 0
    assert "standard" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_memory_leaves_out_what_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 2**20)
    options = cli.make_parser().parse_args(["memory", *SMALL, "--device", "cpu"])
    (row,) = memory.measure(problem_of(options), [512])
    assert row.why_not == {"standard": "would need some 0.0 GiB"}
    assert set(row.peak_bytes) == {"flash_attn", "sdpa"}


def test_targets_have_the_shared_memory_of_their_kind() -> None:
    assert named_target("cpu") == Target("a CPU")
    assert named_target("8.6").smem_bytes == 99 * 1024
    assert named_target("sm_90").smem_bytes == 227 * 1024
