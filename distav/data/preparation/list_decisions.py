"""Review decisions about the labels of multi-label clips: one row per clip and class.

Legend: N clips, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.labels import class_index, sample_ids
from distav.data.annotations.multi_labels import ONE_LABEL_TABLE, load_multi_labels
from distav.data.annotations.tables import Table, TableFormat, read_user_table
from distav.data.dataset import ShardedDataset, Split
from distav.data.preparation.review_decisions import ReviewResult
from distav.data.preparation.reviewers import Decisions, merge_decisions

PRESENT, ABSENT = "present", "absent"
"""Decided values of a class of a clip."""
DECISIONS = ("add", "remove", "keep")
"""Values of the column `decision`; an empty one is not decided."""
_DECISIONS = TableFormat(
    "key,class,decision",
    ("key", "class", "decision"),
    others_allowed=True,
    mistaken=("label", ONE_LABEL_TABLE.format("a table with the columns key, class and decision")),
)
_CORRECTIONS = TableFormat(
    "key,posterior",
    ("key", "posterior"),
    others_allowed=True,
    mistaken=("confidence", ONE_LABEL_TABLE.format("labels/PHASE.parquet of a run on this dataset")),
)


def apply_list_decisions(
    shards: ShardedDataset, split: Split, decisions: Sequence[Path], labels: Path | None, min_confidence: float
) -> ReviewResult:
    """Apply the table of a run, then the merged decisions of the reviewers, which take precedence.

    Args:
        shards: a multi-label dataset.
        split: one of its splits.
        decisions: CSV or Parquet table of each reviewer with `key`, `class` and `decision`.
        labels: table of a run with `key` and `posterior`, a list of the probabilities of all classes.
        min_confidence: confidence from which the posterior of a class replaces its given label.

    Raises:
        UserError: for a missing column, or an unknown key, class or value.
    """
    given = load_multi_labels(shards, split).given
    review = ReviewResult(given, given.copy(), {})
    if labels:
        _apply_posteriors(review, labels, shards.classes, split, min_confidence)
    reviewers = [read_list_decisions(path, shards.classes, split, given) for path in decisions]
    merged = merge_decisions(reviewers, split, shards.classes)
    for sample, decided in merged.merged.items():
        for name, value in decided.items():
            column = shards.classes.index(name)
            review.reviewed[sample, column] = value == PRESENT if value else given[sample, column]
    return replace(review, review=merged) if len(reviewers) > 1 else review


def read_list_decisions(path: Path, classes: list[str], split: Split, given: np.ndarray) -> Decisions:
    """Read the decisions of one reviewer: `PRESENT` or `ABSENT` by class, by clip.

    Args:
        path: CSV or Parquet table with `key`, `class` and `decision`, which is one of `DECISIONS` or empty.
        classes: class names.
        split: split of the clips.
        given: [N, C] bool given labels, which `keep` confirms.

    Raises:
        UserError: for a missing column, an unknown key, class or decision, or a class of a clip in two rows.
    """
    table = read_user_table(path, f"--decisions={path}", _DECISIONS)
    samples = _samples_of(table, split)
    decisions: Decisions = {}
    for row, (name, decision) in enumerate(zip(table.columns["class"], table.columns["decision"], strict=True)):
        where, sample = table.position(row), samples[row]
        column = class_index(name, classes, where)
        if decision not in (*DECISIONS, "", None):
            raise UserError(
                f"{where}: decision '{decision}'; allowed: {format_list(DECISIONS)}, or empty."
                f"{did_you_mean(str(decision), DECISIONS)}"
            )
        decided = decisions.setdefault(sample, {})
        if name in decided:
            raise UserError(f"{where}: class '{name}' of {split.keys[sample]} is decided in an earlier row; keep one.")
        if decision:
            is_present = decision == "add" or (decision == "keep" and bool(given[sample, column]))
            decided[name] = PRESENT if is_present else ABSENT
    return {sample: decided for sample, decided in decisions.items() if decided}


def _samples_of(table: Table, split: Split) -> list[int]:
    """Return the ids that the rows refer to; unlike `sample_ids`, several rows may refer to a clip."""
    keys = table.columns["key"]
    first_rows = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = sorted(first_rows.values())
    unique = Table(
        table.name, {"key": [keys[row] for row in rows]}, table.row_unit, [table.row_numbers[row] for row in rows]
    )
    ids = dict(zip(unique.columns["key"], sample_ids(unique, "key", split), strict=True))
    return [ids[key] for key in keys]


def _apply_posteriors(
    review: ReviewResult, path: Path, classes: list[str], split: Split, min_confidence: float
) -> None:
    """Apply the posteriors of a run to `review`."""
    table = read_user_table(path, f"--labels={path}", _CORRECTIONS)
    for row, sample in enumerate(sample_ids(table, "key", split)):
        probs = _probabilities(table.columns["posterior"][row], len(classes), table.position(row))
        review.reviewed[sample, probs >= min_confidence] = True
        review.reviewed[sample, 1 - probs >= min_confidence] = False


def _probabilities(value: Any, num_classes: int, where: str) -> np.ndarray:
    """Return a list of probabilities as an array [C]."""
    try:
        probs = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        probs = np.zeros(0)
    if probs.shape != (num_classes,) or not ((probs > -1e-6) & (probs < 1 + 1e-6)).all():
        raise UserError(
            f"{where}: posterior {str(value)[:80]}; allowed: a list of {num_classes} numbers from 0 to 1, one for each "
            "class; use the table labels/PHASE.parquet of a run on this dataset."
        )
    return probs
