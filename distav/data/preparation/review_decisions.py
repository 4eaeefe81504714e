"""Review decisions about training clips, made by reviewers or by a run: tables by key."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError
from distav.data.annotations.labels import LISTS_TABLE, class_index, load_labels, sample_ids
from distav.data.annotations.tables import TableFormat, read_user_table
from distav.data.dataset import ShardedDataset, Split
from distav.data.preparation.reviewers import Review, merge_decisions, read_decisions

_ROUNDING = 1e-6
"""Amount by which a probability in float32 may exceed 0 or 1."""


@dataclass(frozen=True)
class ReviewResult:
    """Labels and removed clips of a split after a review.

    Attributes:
        given: [N] int64, labels before the review; [N, C] bool in a multi-label dataset.
        reviewed: labels after it, likewise.
        removed: reason of removal by id.
        review: merged decisions of several reviewers; None with fewer than two.
    """

    given: np.ndarray
    reviewed: np.ndarray
    removed: dict[int, str]
    review: Review | None = None

    @property
    def kept(self) -> np.ndarray:
        """Ids of the clips that are not removed, [M] int64, ascending."""
        return np.setdiff1d(np.arange(len(self.reviewed)), list(self.removed))


def apply_decisions(
    shards: ShardedDataset,
    split: Split,
    decisions: Sequence[Path],
    labels: Path | None,
    min_confidence: float,
    min_correspondence: float,
) -> ReviewResult:
    """Apply the table of a run, then the merged decisions of the reviewers, which take precedence.

    Args:
        shards: a dataset with one class per clip.
        split: one of its splits.
        decisions: CSV or Parquet table of each reviewer with `key`, `label` (empty: unchanged), and optionally `pair`
            and `action`.
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
    reviewers = [read_decisions(path, shards.classes, split) for path in decisions]
    merged = merge_decisions(reviewers, split)
    _apply_merged_decisions(review, merged, shards.classes)
    return replace(review, review=merged) if len(reviewers) > 1 else review


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
    mistaken = ("posterior", LISTS_TABLE.format("labels/PHASE.parquet of a run on this dataset"))
    table_format = TableFormat(",".join(required), required, optional, True, mistaken=mistaken)
    table = read_user_table(path, f"--labels={path}", table_format)
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


def _apply_merged_decisions(review: ReviewResult, merged: Review, classes: list[str]) -> None:
    """Apply decisions to `review`; a clip with a decision is kept unless it is to be removed, a tie keeps its label."""
    for sample, decided in merged.merged.items():
        if "label" in decided:
            label = decided["label"]
            review.reviewed[sample] = classes.index(label) if label else review.given[sample]
        review.removed.pop(sample, None)
        if decided.get("pair") == "mismatched":
            review.removed[sample] = "mismatched pair"
        elif decided.get("action") == "remove":
            review.removed[sample] = "removed by review"


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
