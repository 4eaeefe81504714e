"""Plain-text tables with columns that are aligned for any script and lines of limited width."""

from collections.abc import Sequence

from distav.drawing.text import display_width, printable

LINE_WIDTH = 120
"""Columns of a line."""


def truncate(text: object, max_width: int) -> str:
    """Return text in at most `max_width` columns, ending in ... if it was truncated."""
    shown = printable(text)
    if display_width(shown) <= max_width:
        return shown
    while shown and display_width(shown) > max_width - 3:
        shown = shown[:-1]
    return shown + "..."


def format_table(head: Sequence[str], rows: Sequence[Sequence[object]], max_width: int = 48) -> str:
    """Return a table as text, in which columns of numbers are right-aligned.

    Args:
        head: names of the columns.
        rows: cells; floats are shown with one decimal.
        max_width: largest width of a cell.
    """
    cells = [[truncate(f"{cell:.1f}" if isinstance(cell, float) else cell, max_width) for cell in row] for row in rows]
    is_number = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    widths = [max(map(display_width, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for row in [list(head), *cells]:
        padded = [
            " " * (width - display_width(cell)) + cell if right else cell + " " * (width - display_width(cell))
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
