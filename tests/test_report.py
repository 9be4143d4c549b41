"""`python -m flash_attn info`: what it finds here, and what it says where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from flash_attn import __version__, cli, ops
from flash_attn.commands import report as report_module
from flash_attn.commands.report import Backend, Gpu, Report

BUILD: ops.BuildInfo = {
    "version": __version__,
    "torch_version": "2.13.0",
    "cuda_version": "13.0",
    "cuda_archs": ["80", "90"],
    "kernels": "",
    "rows": ["fwd/sm80/64/bf16", "fwd/sm80/128/bf16", "fwd/sm80/64/fp16", "bwd/sm80/64/bf16"],
}
CPU_BUILD: ops.BuildInfo = {**BUILD, "cuda_version": None, "cuda_archs": [], "rows": []}
H100 = Gpu("H100", 90, 80.0)


def make_report(
    build: ops.BuildInfo | None,
    *,
    gpus: tuple[Gpu, ...] = (),
    driver: str | None = None,
    nvcc: str | None = None,
) -> Report:
    return Report(
        version=__version__,
        python="3.12",
        platform="Linux",
        torch="2.11",
        torch_cuda="13.0",
        driver=driver,
        nvcc=nvcc,
        gpus=list(gpus),
        module=None,
        build=build,
        backends=[Backend("cpu", built=True, works=True)],
    )


def run_module(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flash_attn", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_text_names_version_torch_and_backends() -> None:
    result = run_module("info")
    assert result.returncode == 0, result.stderr
    assert f"flash_attn  {__version__}" in result.stdout
    assert torch.__version__ in result.stdout
    assert f"built with  torch {ops.build_info()['torch_version']}\n" in result.stdout
    assert "backend     cpu: works" in result.stdout


def test_json_agrees_with_the_module() -> None:
    result = run_module("--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["version"] == __version__
    assert report["build"] == ops.build_info()
    assert report["module"].endswith("_C.abi3.so")
    assert {backend["name"]: backend["works"] for backend in report["backends"]}["cpu"]
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_missing_module_is_reported_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "load_error", "No module named 'flash_attn._C'")
    assert cli.main([]) == 1
    text = capsys.readouterr().out
    assert "No module named 'flash_attn._C'" in text
    assert "pip install ." in text
    assert "works" not in text


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (make_report({**BUILD, "version": "1.0"}), "this one is 1.0"),
        (make_report({**BUILD, "kernels": "fwd/sm80"}), "FLASH_ATTN_KERNELS=fwd/sm80"),
        (make_report(CPU_BUILD, gpus=(H100,)), "install a CUDA toolkit"),
        (make_report(CPU_BUILD, gpus=(H100,), nvcc="/bin/nvcc"), "FLASH_ATTN_CUDA_ARCHS"),
        (make_report(BUILD, driver="580.1"), "PyTorch that can use the GPU"),
        (make_report(BUILD, gpus=(Gpu("T4", 75, 16.0),)), "Ampere"),
    ],
)
def test_each_missing_part_has_a_sentence(report: Report, expected: str) -> None:
    sentences = report_module.missing_parts(report, None)
    assert len(sentences) == 1
    assert expected in sentences[0]


@pytest.mark.parametrize("build", [BUILD, CPU_BUILD])
def test_nothing_is_missing_from_a_whole_installation(build: ops.BuildInfo) -> None:
    gpus = (H100,) if build is BUILD else ()
    assert report_module.missing_parts(make_report(build, gpus=gpus), None) == []


@pytest.mark.parametrize(
    ("family", "archs", "compute_capability", "expected"),
    [
        ("sm80", [80], 80, True),
        ("sm80", [80], 86, True),
        ("sm80", [80], 90, True),  # through PTX
        ("sm80", [80, 90], 120, True),  # through PTX
        ("sm80", [80, 100], 90, False),  # sm_80 code is another major version, PTX is too new
        ("sm80", [86], 80, False),
        ("sm80", [90], 80, False),
        ("sm80", [], 80, False),
        ("sm90", [80, 90], 90, True),
        ("sm90", [80], 90, False),
        ("sm90", [80, 90], 80, False),
        ("sm90", [80, 90], 100, False),  # there is no PTX of this family
    ],
)
def test_which_gpus_a_family_runs_on(
    family: str, archs: list[int], compute_capability: int, expected: bool
) -> None:
    assert report_module.runs_on(family, archs, compute_capability) is expected


def test_gpu_backend_says_why_it_does_not_work() -> None:
    assert report_module.gpu_backend("sm80", CPU_BUILD, [H100]).why_not == "not in this build"
    assert not report_module.gpu_backend("sm80", BUILD, []).works
    too_old = report_module.gpu_backend("sm80", BUILD, [Gpu("T4", 75, 16.0)])
    assert too_old.why_not == "cuda:0 is sm_75, built for 80;90"
    build = {**BUILD, "rows": ["fwd/sm90/64/bf16"]}
    too_new = report_module.gpu_backend("sm90", build, [Gpu("B200", 100, 180.0)])
    assert too_new.why_not == "cuda:0 is sm_100, built for 90"


def test_a_failing_call_is_a_backend_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "flash_attn_func", lambda q, k, v, causal: q - 1)
    assert report_module.try_call("cpu") == "a small call gave a wrong result"
    assert not report_module.make_backends(CPU_BUILD, [])[0].works


def test_incomplete_without_a_backend_for_the_gpu() -> None:
    assert report_module.is_complete(make_report(CPU_BUILD))
    assert not report_module.is_complete(make_report(CPU_BUILD, gpus=(H100,)))


def test_rows_are_summed_up_by_pass_and_family() -> None:
    assert report_module.summary_of_rows(BUILD["rows"]) == [
        "fwd/sm80: head dims up to 64, 128 in bf16, fp16",
        "bwd/sm80: head dims up to 64 in bf16",
    ]


def test_a_torch_that_is_too_old_is_to_be_upgraded() -> None:
    report = make_report(None)
    report.torch = "2.9.1"
    (sentence,) = report_module.missing_parts(report, "why")
    assert (
        sentence.endswith("this is 2.9.1: pip install 'torch>=2.10'") and "source" not in sentence
    )
