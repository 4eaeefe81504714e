"""What a person decided of training clips, and what a run found out about them: tables by key."""

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import read_table

PAIRS = ("mismatched", "matched", "")


@dataclass(frozen=True)
class ReviewResult:
    """What becomes of the clips of a split.

    Attributes:
        before: [N] int64 classes, as given until now.
        after: [N] int64 classes.
        left_out: the reason by id.
    """

    given: np.ndarray
    reviewed: np.ndarray
    removed: dict[int, str]

    @property
    def kept(self) -> np.ndarray:
        """Ids of the clips that stay, in order: [M] int64."""
        return np.setdiff1d(np.arange(len(self.reviewed)), list(self.removed))


def apply_decisions(
    shards: ShardedDataset,
    split: Split,
    decisions: Path | None,
    labels: Path | None,
    min_confidence: float,
    min_correspondence: float,
) -> ReviewResult:
    """Apply a run's table, then a person's, which is the last word on every clip it names.

    Args:
        shards: a set whose clips have one class each.
        split: its split.
        decisions: CSV or Parquet with `key`, `label` (empty: as it would be without) and, if wanted, `pair`.
        labels: a run's table with `key`, `corrected`, `confidence` and `correspondence`.
        min_confidence: from which a corrected label is taken.
        min_correspondence: below which a clip is left out.

    Raises:
        UserError: for a missing column, and a key, class or value that there is not.
    """
    given = load_labels(shards, split).given
    after, left_out = given.copy(), dict[int, str]()
    place = {str(key): number for number, key in enumerate(split.keys)}
    if labels:
        measured = ["confidence", *(["correspondence"] if min_correspondence > 0 else [])]
        columns = _columns(labels, "--labels", ["key", "corrected_label", *measured])
        for row, sample in enumerate(_samples(columns["key"], place, f"--labels={labels}", split)):
            where = f"--labels={labels}, key '{columns['key'][row]}'"
            number = _class(columns["corrected_label"][row], shards.classes, where)
            if _number(columns["confidence"][row], f"{where}: confidence") >= min_confidence:
                after[sample] = number
            if min_correspondence > 0:
                found = _number(columns["correspondence"][row], f"{where}: correspondence")
                if found < min_correspondence:
                    left_out[sample] = f"correspondence {found:.3f} is below {min_correspondence:g}"
    if decisions:
        columns = _columns(decisions, "--decisions", ["key", "label"])
        for row, sample in enumerate(_samples(columns["key"], place, f"--decisions={decisions}", split)):
            where = f"--decisions={decisions}, key '{columns['key'][row]}'"
            label, pair = columns["label"][row], columns["pair"][row] if "pair" in columns else ""
            if pair not in PAIRS:
                raise UserError(f"{where}: pair '{pair}'; allowed: mismatched, matched, or nothing.")
            if label:
                after[sample] = _class(label, shards.classes, where)
            left_out.pop(sample, None)
            if pair == "mismatched":
                left_out[sample] = "mismatched pair"
    return ReviewResult(given, after, left_out)


def _columns(path: Path, option: str, needed: list[str]) -> dict[str, list[str]]:
    """Read a table as text, column by column; what is missing in a row is empty."""
    what = f"{option}={path}"
    if not path.is_file():
        raise UserError(f"{what}: no such file.")
    if path.suffix == ".parquet":
        table = read_table(path)
        columns: dict[str, list[Any]] = {name: table.column(name).to_pylist() for name in table.column_names}
    elif path.suffix == ".csv":
        columns = _csv_columns(path, what)
    else:
        raise UserError(f"{what}: has to end in .csv or .parquet.")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"{what}: column '{missing[0]}' is missing; needed: {format_list(needed)}; found: {format_list(columns)}."
        )
    return {name: ["" if each is None else str(each) for each in values] for name, values in columns.items()}


def _csv_columns(path: Path, what: str) -> dict[str, list[Any]]:
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        head = next(reader, [])
        rows = [row for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{what}: no CSV in UTF-8 ({error}).") from None
    for number, row in enumerate(rows):
        if len(row) != len(head):
            raise UserError(f"{what}, row {number + 1}: {len(row)} cells, the header has {len(head)}.")
    if len(set(head)) < len(head):
        raise UserError(f"{what}: two columns have one name: {format_list(head)}.")
    return {name: [row[place] for row in rows] for place, name in enumerate(head)}


def _samples(keys: list[str], place: dict[str, int], what: str, split: Split) -> list[int]:
    """Return the ids of keys, each of which may stand there once."""
    unknown = [key for key in keys if key not in place]
    if unknown:
        raise UserError(
            f"{what}: {len(unknown)} keys are not in split {split.name} of {split.root}: {format_list(unknown, 3)}; "
            f"allowed: {format_list(split.keys, 2)}. Take a table made for this set."
        )
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(f"{what}: key '{twice[0]}' is there more than once; keep one row of it.")
    return [place[key] for key in keys]


def _class(name: str, classes: list[str], where: str) -> int:
    if name not in classes:
        raise UserError(
            f"{where}: unknown class '{name}'; allowed: {format_list(classes)}.{did_you_mean(name, classes)}"
        )
    return classes.index(name)


def _number(text: str, what: str) -> float:
    try:
        return float(text or math.nan)
    except ValueError:
        raise UserError(f"{what} '{text}'; allowed: numbers from 0 to 1.") from None
