"""What README and CONTRIBUTING say is true: the example runs, what they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_attn

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/install.md", "docs/sm80.md", "docs/forward_sm90.md")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["out"].shape == names["q"].shape
    assert names["softmax_lse"].dtype == torch.float32
    assert all(names[name].grad is not None for name in "qkv")


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    named = re.findall(r"`((?:csrc|flash_attn|tests|tools|examples|docs)/[\w./]*)`", text_of(page))
    assert named
    built = ("flash_attn/_C.abi3.so",)
    assert [path for path in named if path not in built and not (ROOT / path).exists()] == []


def test_public_names_are_in_the_readme() -> None:
    readme = text_of("README.md")
    functions = [name for name in flash_attn.__all__ if name.startswith("flash_attn")]
    assert [
        name for name in functions if f"`{name}`" not in readme and f"{name}(" not in readme
    ] == []


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
    rows = re.findall(r"^\| (`[^|]*) \|", text_of("CONTRIBUTING.md"), re.MULTILINE)
    in_table = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    in_text = re.findall(r"`make ([a-z][\w-]*)`", text_of("README.md") + text_of("CONTRIBUTING.md"))
    assert len(in_table) > 5 and in_text
    assert sorted({*in_table, *in_text} - set(targets)) == []


def test_build_variables_are_read_somewhere() -> None:
    variables = re.findall(r"^\| `([A-Z_]+)` \|", text_of("README.md"), re.MULTILINE)
    code = "".join(text_of(path) for path in ("tools/build_plan.py", "third_party/cutlass.py"))
    assert len(variables) == 4
    assert [name for name in variables if f'"{name}"' not in code] == []
