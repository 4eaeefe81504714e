"""Several classes per clip in a list of clips: labels with a separator, and repeated rows."""

from dataclasses import replace

from distav.config.errors import UserError
from distav.data.annotations.multi_labels import LABEL_SEPARATOR, LABEL_SEPARATORS, split_label_text
from distav.data.annotations.tables import Table
from distav.data.preparation.encoding import ClipSource


def join_list_labels(candidate: ClipSource, separator: str, where: str) -> ClipSource:
    """Return the candidate with its classes separated by `LABEL_SEPARATOR`.

    Args:
        candidate: a row of the list, with the label as it is written there.
        separator: separates the classes in the label; empty: the label is one class.
        where: the row, for error messages.

    Raises:
        UserError: for an empty or repeated class, or a class name that contains a separator.
    """
    names = split_label_text(candidate.label, separator, where) if separator else (candidate.label,)
    if not separator and (other := next((mark for mark in LABEL_SEPARATORS if mark in candidate.label), None)):
        raise UserError(
            f"{where}: label '{candidate.label}' contains '{other}', which is not allowed in a class name of a "
            f"multi-label list; for several classes in a label, add --label-separator '{other}'."
        )
    return replace(candidate, label=LABEL_SEPARATOR.join(names))


def merge_rows(candidates: list[ClipSource], table: Table) -> list[ClipSource]:
    """Return one candidate for all rows with the same file and interval, with the classes of each, in their order.

    Args:
        candidates: the rows, with classes separated by `LABEL_SEPARATOR`.
        table: the list, for error messages.

    Raises:
        UserError: if the rows of a clip are in different splits, or name a class twice.
    """
    first_rows: dict[tuple[str, float, float | None], int] = {}
    merged: dict[int, ClipSource] = {}
    for row, candidate in enumerate(candidates):
        first = first_rows.setdefault((candidate.source, candidate.start_s, candidate.end_s), row)
        if first == row:
            merged[row] = candidate
            continue
        previous, where = merged[first], table.position(row)
        line = f"{table.row_unit} {table.row_numbers[first]}"
        if candidate.split != previous.split:
            raise UserError(
                f"{where}: the clip is in split {candidate.split}, but in split {previous.split} in {line}; use one "
                "split for all rows of a clip."
            )
        names = previous.label.split(LABEL_SEPARATOR)
        if repeated := next((name for name in candidate.label.split(LABEL_SEPARATOR) if name in names), None):
            raise UserError(f"{where}: the clip has the class '{repeated}' already, see {line} and after; keep one.")
        merged[first] = replace(previous, label=LABEL_SEPARATOR.join([*names, *candidate.label.split(LABEL_SEPARATOR)]))
    return list(merged.values())
