"""Tables for people: columns that line up whatever their text is, and no line that runs over."""

import unicodedata
from collections.abc import Sequence

WIDTH = 120
"""Columns of a line."""


def printable(text: object) -> str:
    """Return text without what would move a terminal's cursor or change its colours."""
    return "".join(each if each.isprintable() else "\ufffd" for each in str(text))


def width(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.combining(each) > 0 for each in text)


def cut(text: object, most: int) -> str:
    """Return text in at most so many columns, with ... for what was left out."""
    shown = printable(text)
    if width(shown) <= most:
        return shown
    while shown and width(shown) > most - 3:
        shown = shown[:-1]
    return shown + "..."


def table(head: Sequence[str], rows: Sequence[Sequence[object]], most: int = 48) -> str:
    """Return a table as text: the first column to the left, numbers to the right.

    Args:
        head: names of the columns.
        rows: cells; numbers with a fraction are shown with one digit of it.
        most: columns that a cell may take.
    """
    cells = [[cut(f"{each:.1f}" if isinstance(each, float) else each, most) for each in row] for row in rows]
    numbers = [all(isinstance(row[place], int | float) for row in rows) for place in range(len(head))]
    wide = [max(map(width, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for row in [list(head), *cells]:
        padded = [
            " " * (size - width(cell)) + cell if right else cell + " " * (size - width(cell))
            for cell, size, right in zip(row, wide, numbers, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
