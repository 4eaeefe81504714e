"""Review decisions about training clips, made by a person or by a run: tables by key."""

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

PAIR_VALUES = ("mismatched", "matched", "")


@dataclass(frozen=True)
class ReviewResult:
    """Labels and removed clips of a split after a review.

    Attributes:
        given: [N] int64, labels before the review.
        reviewed: [N] int64, labels after it.
        removed: reason of removal by id.
    """

    given: np.ndarray
    reviewed: np.ndarray
    removed: dict[int, str]

    @property
    def kept(self) -> np.ndarray:
        """Ids of the clips that are not removed, [M] int64, ascending."""
        return np.setdiff1d(np.arange(len(self.reviewed)), list(self.removed))


def apply_decisions(
    shards: ShardedDataset,
    split: Split,
    decisions: Path | None,
    labels: Path | None,
    min_confidence: float,
    min_correspondence: float,
) -> ReviewResult:
    """Apply the table of a run, then the decisions of a person, which take precedence.

    Args:
        shards: a dataset with one class per clip.
        split: one of its splits.
        decisions: CSV or Parquet table with `key`, `label` (empty: unchanged) and optionally `pair`.
        labels: table of a run with `key`, `corrected_label`, `confidence` and `correspondence`.
        min_confidence: confidence from which a corrected label replaces the given label.
        min_correspondence: correspondence probability below which a clip is removed.

    Raises:
        UserError: for a missing column, or an unknown key, class or value.
    """
    given = load_labels(shards, split).given
    reviewed, removed = given.copy(), dict[int, str]()
    id_of_key = {str(key): sample for sample, key in enumerate(split.keys)}
    if labels:
        _apply_run_table(labels, shards, split, id_of_key, min_confidence, min_correspondence, reviewed, removed)
    if decisions:
        _apply_decisions_table(decisions, shards, split, id_of_key, reviewed, removed)
    return ReviewResult(given, reviewed, removed)


def _apply_run_table(
    path: Path,
    shards: ShardedDataset,
    split: Split,
    id_of_key: dict[str, int],
    min_confidence: float,
    min_correspondence: float,
    reviewed: np.ndarray,
    removed: dict[int, str],
) -> None:
    table = f"--labels={path}"
    needed = ["key", "corrected_label", "confidence"]
    if min_correspondence > 0:
        needed.append("correspondence")
    columns = _read_columns(path, "--labels", needed)
    for row, sample in enumerate(_sample_ids(columns["key"], id_of_key, table, split)):
        where = f"{table}, key '{columns['key'][row]}'"
        label = _class_index(columns["corrected_label"][row], shards.classes, where)
        if _parse_number(columns["confidence"][row], f"{where}: confidence") >= min_confidence:
            reviewed[sample] = label
        if min_correspondence > 0:
            correspondence = _parse_number(columns["correspondence"][row], f"{where}: correspondence")
            if correspondence < min_correspondence:
                removed[sample] = f"correspondence {correspondence:.3f} is below {min_correspondence:g}"


def _apply_decisions_table(
    path: Path,
    shards: ShardedDataset,
    split: Split,
    id_of_key: dict[str, int],
    reviewed: np.ndarray,
    removed: dict[int, str],
) -> None:
    table = f"--decisions={path}"
    columns = _read_columns(path, "--decisions", ["key", "label"])
    for row, sample in enumerate(_sample_ids(columns["key"], id_of_key, table, split)):
        where = f"{table}, key '{columns['key'][row]}'"
        label = columns["label"][row]
        pair = columns["pair"][row] if "pair" in columns else ""
        if pair not in PAIR_VALUES:
            raise UserError(f"{where}: pair '{pair}'; allowed: mismatched, matched, or empty.")
        if label:
            reviewed[sample] = _class_index(label, shards.classes, where)
        removed.pop(sample, None)
        if pair == "mismatched":
            removed[sample] = "mismatched pair"


def _read_columns(path: Path, option: str, needed: list[str]) -> dict[str, list[str]]:
    """Return the columns of a table as text; missing values are empty.

    Raises:
        UserError: if the file cannot be read, or if a needed column is missing.
    """
    where = f"{option}={path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file.")
    if path.suffix == ".parquet":
        table = read_table(path)
        columns: dict[str, list[Any]] = {name: table.column(name).to_pylist() for name in table.column_names}
    elif path.suffix == ".csv":
        columns = _read_csv_columns(path, where)
    else:
        raise UserError(f"{where}: the file name has to end in .csv or .parquet.")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"{where}: column '{missing[0]}' is missing; needed: {format_list(needed)}; the table has: "
            f"{format_list(columns)}."
        )
    return {name: ["" if value is None else str(value) for value in values] for name, values in columns.items()}


def _read_csv_columns(path: Path, where: str) -> dict[str, list[Any]]:
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        header = next(reader, [])
        rows = [row for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: not CSV in UTF-8 ({error}).") from None
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{where}, row {number}: {len(row)} cells, the header has {len(header)}.")
    if len(set(header)) < len(header):
        raise UserError(f"{where}: two columns have the same name: {format_list(header)}.")
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def _sample_ids(keys: list[str], id_of_key: dict[str, int], where: str, split: Split) -> list[int]:
    """Return the ids of keys.

    Raises:
        UserError: for a key that the split does not have, or that occurs twice.
    """
    unknown = [key for key in keys if key not in id_of_key]
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} keys are not in split {split.name} of {split.root}: {format_list(unknown, 3)}; "
            f"allowed: {format_list(split.keys, 2)}. Use a table made for this dataset."
        )
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise UserError(f"{where}: key '{repeated[0]}' occurs more than once; keep one row.")
    return [id_of_key[key] for key in keys]


def _class_index(name: str, classes: list[str], where: str) -> int:
    if name not in classes:
        raise UserError(
            f"{where}: unknown class '{name}'; allowed: {format_list(classes)}.{did_you_mean(name, classes)}"
        )
    return classes.index(name)


def _parse_number(text: str, where: str) -> float:
    try:
        return float(text or math.nan)
    except ValueError:
        raise UserError(f"{where} '{text}'; allowed: numbers from 0 to 1.") from None
