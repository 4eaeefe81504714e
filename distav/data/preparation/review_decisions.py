"""Review decisions about training clips, made by a person or by a run: tables by key."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError
from distav.data.annotations.labels import class_index, load_labels, sample_ids
from distav.data.annotations.tables import TableFormat, read_user_table
from distav.data.dataset import ShardedDataset, Split

PAIR_VALUES = ("mismatched", "matched", "")
_DECISIONS = TableFormat("key,label[,pair]", ("key", "label"), ("pair",), others_allowed=True)
_ROUNDING = 1e-6
"""Amount by which a probability in float32 may exceed 0 or 1."""


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
    review = ReviewResult(given, given.copy(), {})
    if labels:
        _apply_run_table(review, labels, shards.classes, split, min_confidence, min_correspondence)
    if decisions:
        _apply_decisions_table(review, decisions, shards.classes, split)
    return review


def _apply_run_table(
    review: ReviewResult,
    path: Path,
    classes: list[str],
    split: Split,
    min_confidence: float,
    min_correspondence: float,
) -> None:
    """Apply the corrected labels of a run to `review`."""
    required = ("key", "corrected_label", "confidence")
    optional = ("correspondence",)
    if min_correspondence > 0:
        required, optional = required + optional, ()
    table = read_user_table(path, f"--labels={path}", TableFormat(",".join(required), required, optional, True))
    columns = table.columns
    for row, sample in enumerate(sample_ids(table, "key", split)):
        where = table.position(row)
        label = class_index(columns["corrected_label"][row], classes, where)
        if _parse_probability(columns["confidence"][row], f"{where}: confidence") >= min_confidence:
            review.reviewed[sample] = label
        if min_correspondence > 0:
            correspondence = _parse_probability(columns["correspondence"][row], f"{where}: correspondence")
            if correspondence < min_correspondence:
                review.removed[sample] = f"correspondence {correspondence:.3f} is below {min_correspondence:g}"


def _apply_decisions_table(review: ReviewResult, path: Path, classes: list[str], split: Split) -> None:
    """Apply the decisions of a person to `review`."""
    table = read_user_table(path, f"--decisions={path}", _DECISIONS)
    columns = table.columns
    for row, sample in enumerate(sample_ids(table, "key", split)):
        where = table.position(row)
        pair = columns["pair"][row] or "" if "pair" in columns else ""
        if pair not in PAIR_VALUES:
            raise UserError(f"{where}: pair '{pair}'; allowed: mismatched, matched, or empty.")
        if columns["label"][row]:
            review.reviewed[sample] = class_index(columns["label"][row], classes, where)
        review.removed.pop(sample, None)
        if pair == "mismatched":
            review.removed[sample] = "mismatched pair"


def _parse_probability(value: Any, where: str) -> float:
    """Return a probability given as a number or as text; NaN if the cell is empty, or NaN in a Parquet table."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not -_ROUNDING <= number <= 1 + _ROUNDING:
        raise UserError(f"{where} '{value}'; allowed: numbers from 0 to 1, or empty.")
    return number
