"""The package's docstrings are plain text with single backquotes: what Sphinx needs beside that."""

from __future__ import annotations

import re
from typing import Any

SECTION = re.compile(r"(Args|Returns|Raises|Example|Attributes):$")
REST = "The rest as for"


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def literal_blocks(lines: list[str]) -> list[str]:
    """Indented paragraphs before the first section are shown as they are."""
    result: list[str] = []
    is_prose, in_block = True, False
    for index, line in enumerate(lines):
        is_prose = is_prose and not SECTION.match(line)
        starts = is_prose and index > 1 and line.startswith("    ") and not lines[index - 1].strip()
        if starts and not in_block:
            result[-1:] = ["", "::", ""]
        in_block = is_prose and (starts or (in_block and (not line or line.startswith(" "))))
        result.append(line)
    return result


def rest_before_sections(lines: list[str]) -> list[str]:
    """The line that says where the other arguments are documented is no argument."""
    rest = [line.strip() for line in lines if line.strip().startswith(REST)]
    if not rest:
        return lines
    kept = [line for line in lines if not line.strip().startswith(REST)]
    at = next(index for index, line in enumerate(kept) if SECTION.match(line))
    name = rest[0].removeprefix(REST).strip(" .")
    return [*kept[:at], f"Arguments that are not listed are those of {name}.", "", *kept[at:]]


def plain_bars(lines: list[str]) -> list[str]:
    """The bars of an absolute value are no substitution."""
    return [line.replace("|", "\\|") if "`" not in line else line for line in lines]


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rest_before_sections(literal_blocks(plain_bars(lines)))


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
