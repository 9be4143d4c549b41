"""The package imports on any machine; calls that can't be served say why and what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import machinery
from pathlib import Path

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, ops
from tools import build_plan

PACKAGE = Path(flash_attn.__file__).parent

# Hides the compiled module from the import system.
WITHOUT_MODULE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "flash_attn._C":
            raise ImportError("hidden for a test")

sys.meta_path.insert(0, Hide())
import torch
import flash_attn
from flash_attn import ops
"""


def run(script: str) -> str:
    command = [sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_without_the_compiled_module() -> None:
    output = run(
        WITHOUT_MODULE
        + """
print(flash_attn.__version__)
q = torch.randn(1, 2, 1, 8)
calls = [lambda: flash_attn.flash_attn_func(q, q, q), ops.build_info]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    )
    version, *errors = output.splitlines()
    assert version == flash_attn.__version__
    assert len(errors) == 2
    for error in errors:
        assert re.fullmatch(
            r"flash_attn: expected the compiled module flash_attn/_C\.abi3\.so, which could not be "
            r"loaded: hidden for a test\. Build it with `pip install \.` .*",
            error,
        )


def test_a_torch_that_is_too_old_is_named() -> None:
    """The module isn't even tried: the linker's message names a symbol that says nothing."""
    output = run(
        """
import torch
torch.__version__ = "2.9.1+cu128"
import flash_attn, sys
q = torch.randn(1, 2, 1, 8)
try:
    flash_attn.flash_attn_func(q, q, q)
except RuntimeError as error:
    print(error, "flash_attn._C" in sys.modules)
"""
    )
    assert output.endswith(
        "could not be loaded: it needs torch 2.10 or later, this is 2.9.1+cu128: "
        "pip install 'torch>=2.10' False\n"
    )


def test_oldest_torch_and_gpu_are_those_of_the_build() -> None:
    oldest = "torch>={}.{}".format(*build_plan.OLDEST_TORCH)
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert ops.OLDEST_TORCH == build_plan.OLDEST_TORCH and project.count(f'"{oldest}"') == 2
    major, minor = ops.OLDEST_GPU
    assert 10 * major + minor == build_plan.OLDEST_ARCH


@pytest.mark.parametrize(
    ("capability", "message"),
    [((7, 5), "this GPU is sm_75, older than Ampere"), ((8, 0), "holds the CPU backend only")],
)
def test_cuda_tensors_without_kernels_name_the_remedy_that_helps(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(RuntimeError, match=message):
        ops.raise_no_cuda_backend()


def test_import_needs_no_gpu_and_touches_none() -> None:
    output = run("import torch, flash_attn; print(torch.cuda.is_initialized())")
    assert output.strip() == "False"


def test_import_is_light() -> None:
    """No compiler stack and no plotting library comes with the import."""
    heavy = ["torch._dynamo", "torch._inductor", "matplotlib", "numpy.testing", "triton"]
    # Newer torch's own flop counter, which the ops register with, takes in triton.
    script = (
        f"import sys, torch.utils.flop_counter; before = set(sys.modules); import flash_attn\n"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    assert run(script).strip() == "[]"


def test_the_module_fits_every_python_and_torch() -> None:
    """One stable-ABI file: named so, without ATen's C++ symbols or libraries of one torch build."""
    assert ops.load_error is None
    module = Path(str(sys.modules["flash_attn._C"].__file__))
    assert module.name == "_C.abi3.so" and ".abi3.so" in machinery.EXTENSION_SUFFIXES
    content = module.read_bytes()
    assert b"aoti_torch_empty_strided" in content
    for foreign in (b"_ZN2at", b"_ZNK2at", b"libtorch_python", b"libtorch_cuda", b"libc10_cuda"):
        assert foreign not in content, foreign


def test_build_info_has_what_the_contract_says() -> None:
    info = ops.build_info()
    assert set(info) == {
        *("version", "torch_version", "cuda_version", "cuda_archs", "kernels", "rows")
    }
    assert info["version"] == flash_attn.__version__
    release = re.match(r"2\.(\d+)\.\d+", info["torch_version"])
    assert release is not None and int(release.group(1)) >= 10, info["torch_version"]
    assert isinstance(info["kernels"], str)
    assert bool(info["cuda_archs"]) == bool(info["rows"]) == (info["cuda_version"] is not None)
    for row in info["rows"]:
        assert re.fullmatch(r"(fwd|bwd)/sm\d+/\d+/(bf16|fp16|fp32)(/extras)?", row)
    assert len(set(info["rows"])) == len(info["rows"])
    assert json.loads(json.dumps(info)) == info


@pytest.mark.skipif(bool(ops.cuda_archs), reason="this build serves CUDA tensors")
def test_cuda_tensors_in_a_cpu_build() -> None:
    """Without a GPU the tensors can only be fake, which is as far as the check looks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 2, 1, 8, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(RuntimeError) as error:
            flash_attn_func(q, q, q)
    assert "CUDA tensors need CUDA kernels, but this build holds the CPU backend only" in str(
        error.value
    )
    assert 'FLASH_ATTN_CUDA_ARCHS="80;90" pip install' in str(error.value)


def test_version_is_inside_the_windows_that_importers_accept() -> None:
    public, _, local = flash_attn.__version__.partition("+")
    assert public == "2.8.3" and re.fullmatch(r"\d+\.\d+\.\d+", local)


def test_other_distributions_may_add_subpackages(tmp_path: Path) -> None:
    extra = tmp_path / "flash_attn" / "extra"
    extra.mkdir(parents=True)
    (extra / "__init__.py").write_text("value = 3\n")
    script = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import flash_attn.extra; print(flash_attn.extra.value)"
    )
    assert run(script).strip() == "3"


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
