"""docs/troubleshooting.md quotes what is raised, and everything that has not the usual form."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
VARIES = "…"
USUAL_FORM = re.compile(rf"(?:^|[\w{VARIES}]): expected ")
TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|[^\s"]+')


def text_of_expression(node: ast.expr) -> str | None:
    """Of a string literal, with … for the values in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [n.value if isinstance(n, ast.Constant) else VARIES for n in node.values]
        return "".join(map(str, parts))
    return None


def python_trees() -> Iterator[ast.AST]:
    for path in sorted((ROOT / "flash_attn").rglob("*.py")):
        yield ast.parse(path.read_text())


def python_texts() -> Iterator[str]:
    for tree in python_trees():
        for node in ast.walk(tree):
            text = text_of_expression(node) if isinstance(node, ast.expr) else None
            if text is not None:
                yield text


def python_raises() -> Iterator[str]:
    """Messages of `raise Error("...")`."""
    for tree in python_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = text_of_expression(node.exc.args[0])
                if text is not None:
                    yield text


def cpp_throws() -> Iterator[str]:
    """Messages of `throw std::...("..." + value + "...")`."""
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for arguments in re.findall(r"throw std::\w+\((.*?)\);", path.read_text(), re.DOTALL):
            parts = [
                token[1].replace('\\"', '"') if token[0].startswith('"') else VARIES
                for token in TOKEN.finditer(arguments)
            ]
            yield re.sub(f"{VARIES}+", VARIES, "".join(parts)).strip(VARIES)


def quoted_messages() -> list[str]:
    """Code in headings and in the first column of the table of messages."""
    in_headings = re.findall(r"^###.*", PAGE, re.MULTILINE)
    messages = [text for heading in in_headings for text in re.findall(r"`([^`]+)`", heading)]
    return messages + re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def fragments(message: str) -> list[str]:
    """What does not vary; in the usual form the name and "expected" are put before the rest."""
    parts = [part.strip(" :").removeprefix("expected ") for part in message.split(VARIES)]
    return [part for part in parts if len(part) > 2]


def test_messages_are_found() -> None:
    assert len(quoted_messages()) > 20
    assert len(list(python_raises())) > 20 and len(list(cpp_throws())) > 10


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_exist(message: str) -> None:
    texts = "\n".join((*python_texts(), *cpp_throws()))
    assert [part for part in fragments(message) if part not in texts] == []


def is_quoted(message: str) -> bool:
    """One of the page's messages says nothing that this one does not."""
    return any(
        fragments(quoted) and all(part in message for part in fragments(quoted))
        for quoted in quoted_messages()
    )


@pytest.mark.parametrize("message", sorted({*python_raises(), *cpp_throws()} - {""}))
def test_what_is_raised_is_explained(message: str) -> None:
    assert USUAL_FORM.search(message) or is_quoted(message)


def test_other_messages_are_not() -> None:
    assert not USUAL_FORM.search("something is wrong") and not is_quoted("something is wrong")
