"""Markdown tables of pages as tables for the console."""

import itertools
import re
import sys
from collections.abc import Sequence

from distav.console import Cell, Styled, format_table, is_terminal

_EMPHASIZED = re.compile(r"(\*{1,2})(.+)\1")
_NUMBER = re.compile(r"[-+]?\d")


def from_markdown(text: str) -> str:
    """Return a text whose Markdown tables are drawn as tables for stdout.

    Args:
        text: Markdown; lines of tables begin with `|`.
    """
    parts: list[str] = []
    for is_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        lines = list(group)
        parts.append(_table(lines) if is_table else "\n".join(lines))
    return "\n".join(parts)


def _table(lines: Sequence[str]) -> str:
    head, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    columns = zip(head, *rows, strict=True)
    numbers = [name for name, *cells in columns if all(not cell or _NUMBER.match(cell.strip("*")) for cell in cells)]
    return format_table(
        [name.replace("`", "") for name in head], [[_cell(cell) for cell in row] for row in rows], numbers
    )


def _cell(text: str) -> Cell:
    text = text.replace("`", "")
    if (emphasized := _EMPHASIZED.fullmatch(text)) and is_terminal(sys.stdout):
        return Styled(emphasized[2], "bold" if emphasized[1] == "**" else "italic")
    return text
