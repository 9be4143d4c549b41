"""What README and CONTRIBUTING say is true: the example runs, what they name exists."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_attn
from flash_attn import cli, ops
from flash_attn.reference import visible_keys

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *DOCS)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def test_the_example_runs() -> None:
    (example,) = python_blocks("README.md")
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["out"].shape == names["q"].shape
    assert names["q"].grad.isfinite().all() and names["q"].grad.abs().max() > 0
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/migration.md"])
def test_examples_of_the_site_run(page: str) -> None:
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        exec(block, {})


EXAMPLES = re.findall(r"```python\n(.*?)```", text_of("docs/pytorch.md"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_torchs_tools_run(example: str) -> None:
    """Short ones, and what they import and activate is left as it was."""
    assert len(example.splitlines()) <= 16
    if "activate_flash_attention_impl" in example:
        pytest.importorskip("torch.nn.attention._fa3", reason="torch can't restore")
    exec(example, {})
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    named = re.findall(r"`((?:csrc|flash_attn|tests|tools|examples|docs)/[\w./]*)`", text_of(page))
    assert named or page in DOCS
    built = ("flash_attn/_C.abi3.so",)
    assert [path for path in named if path not in built and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([\w./-]+)\)", text_of(page))
    links += re.findall(r"^```\{(?:include|image|literalinclude)\} (\S+)", text_of(page), re.M)
    made = [link for link in links if link.startswith("_generated/")]
    names = {path.relative_to(ROOT / "docs").as_posix() for path in generated()}
    assert set(made) <= names
    paths = [folder / link for link in links if link not in made]
    assert [path for path in paths if not path.exists()] == []


def generated() -> list[Path]:
    """What the site's build makes."""
    generate = importlib.import_module("generate")
    folder = ROOT / "docs" / "_generated"
    generate.write_all(folder)
    return list(folder.iterdir())


def test_masks_are_drawn_as_they_are() -> None:
    generate = importlib.import_module("generate")
    for left, right, seqlen_q, seqlen_k, padding in generate.MASKS.values():
        drawn = generate.seen_by((left, right, seqlen_q, seqlen_k, padding))
        keys = seqlen_k - padding
        exact = visible_keys(seqlen_q, keys, window_size=(left, right)).tolist()
        assert drawn == [[False] * padding + row for row in exact]
        svg = generate.mask_svg((left, right, seqlen_q, seqlen_k, padding))
        assert svg.count(f'fill="{generate.SEEN}"') == sum(map(sum, exact))


def test_kernel_tables_have_every_row() -> None:
    text = "".join(path.read_text() for path in generated() if path.name.startswith("kernels_"))
    rows = {row for row in ops.build_info()["rows"] if "/bf16" in row}
    assert {row for row in rows if f"`{row}`" not in text} == set()


def commands_of(page: str) -> list[list[str]]:
    text = text_of(page).replace("COMMAND", "info")
    lines = re.findall(r"python -m flash_attn\b(?!\.)([^`\n]*)", text)
    return [shlex.split(line.partition("#")[0]) for line in lines]


def test_commands_are_such() -> None:
    commands = [command for page in PAGES for command in commands_of(page)]
    assert len(commands) > 10
    for command in commands:
        words = [word for word in command if word not in ("or", "...")]
        cli.make_parser().parse_args(words if words else ["info"])


def test_the_sample_of_the_commands_page_is_what_comes(capsys: pytest.CaptureFixture[str]) -> None:
    build = ops.build_info()
    if not {"80", "90"} <= set(build["cuda_archs"]) or build["kernels"]:
        pytest.skip("needs a build of every kernel for 80;90")
    (sample,) = re.findall(r"```text\n(\$.*?)```", text_of("docs/commands.md"), re.DOTALL)
    command, _, output = sample.partition("\n")
    assert cli.main(shlex.split(command)[4:]) == 0
    assert capsys.readouterr().out.startswith(output)


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
