"""Decisions of several reviewers: merged by majority, with their conflicts and agreement.

Legend: V reviewers, n clips, C categories.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError
from distav.console import format_table
from distav.data.annotations.labels import LISTS_TABLE, class_index, sample_ids
from distav.data.annotations.tables import TableFormat, read_user_table
from distav.data.dataset import Split

ALLOWED = {"pair": ("mismatched", "matched", ""), "action": ("remove", "keep", "")}
"""Values of a column of decisions that is no label."""
COLUMNS = ("label", *ALLOWED)
"""Columns of decisions, each of which is merged for itself."""
_DECISIONS = TableFormat(
    "key,label[,pair][,action]",
    ("key", "label"),
    ("pair", "action"),
    others_allowed=True,
    mistaken=("decision", LISTS_TABLE.format("a table with the columns key and label")),
)

REVIEW = "review"
"""Key of the review of several reviewers in manifest.json."""
Decisions = dict[int, dict[str, str]]
"""Decided values by column, by clip."""


@dataclass(frozen=True)
class Conflict:
    """A clip on which reviewers differ.

    Attributes:
        key: key of the clip.
        column: `label`, `pair` or `action`; in a multi-label dataset the class.
        values: the reviewers' values, in the order of the files; empty where a reviewer has not decided.
        merged: value of the majority; empty if there is a tie, which keeps the given label, pair or clip.
    """

    key: str
    column: str
    values: list[str]
    merged: str


@dataclass(frozen=True)
class Agreement:
    """Agreement of the reviewers in a column, over the clips that at least two of them have decided.

    Attributes:
        column: `label`, `pair` or `action`; in a multi-label dataset the class.
        num_clips: number of these clips.
        percent: mean percentage of agreeing pairs of reviewers.
        kappa: Cohen's kappa for two reviewers, else Fleiss' kappa; None if it is not defined, because all values are
            the same.
    """

    column: str
    num_clips: int
    percent: float
    kappa: float | None


@dataclass(frozen=True)
class Review:
    """Merged decisions.

    Attributes:
        merged: by clip; a tie is an empty value.
        conflicts: by clip and column.
        agreement: of the columns that at least two reviewers have decided for a clip.
    """

    merged: Decisions
    conflicts: list[Conflict]
    agreement: list[Agreement]


def read_decisions(path: Path, classes: list[str], split: Split) -> Decisions:
    """Read the decisions of one reviewer; empty cells are not decided.

    Args:
        path: CSV or Parquet table with `key`, `label`, and optionally `pair` and `action`.
        classes: class names.
        split: split of the clips.

    Raises:
        UserError: for a missing column, or an unknown key, class or value.
    """
    table = read_user_table(path, f"--decisions={path}", _DECISIONS)
    decisions: Decisions = {}
    for row, sample in enumerate(sample_ids(table, "key", split)):
        decided = {name: table.columns[name][row] or "" for name in COLUMNS if name in table.columns}
        if decided["label"]:
            class_index(decided["label"], classes, table.position(row))
        for name, allowed in ALLOWED.items():
            if decided.get(name, "") not in allowed:
                values = ", ".join(value for value in allowed if value)
                raise UserError(f"{table.position(row)}: {name} '{decided[name]}'; allowed: {values}, or empty.")
        decisions[sample] = {name: value for name, value in decided.items() if value}
    return decisions


def merge_decisions(reviewers: Sequence[Decisions], split: Split, columns: Sequence[str] = COLUMNS) -> Review:
    """Merge the decisions of several reviewers: the majority of those who decided; a tie keeps what is given.

    Args:
        reviewers: decisions of each reviewer.
        split: split of the clips.
        columns: names of the decided values: columns of the tables, or classes of a multi-label dataset.
    """
    merged: Decisions = {}
    conflicts: list[Conflict] = []
    for sample in sorted({sample for decisions in reviewers for sample in decisions}):
        merged[sample] = {}
        for column in columns:
            values = [decisions.get(sample, {}).get(column, "") for decisions in reviewers]
            counts = Counter(value for value in values if value).most_common(2)
            is_tie = len(counts) == 2 and counts[0][1] == counts[1][1]
            winner = counts[0][0] if counts and not is_tie else ""
            if counts:
                merged[sample][column] = winner
            if len(counts) == 2:
                conflicts.append(Conflict(str(split.keys[sample]), column, values, winner))
    agreement = [result for column in columns if (result := measure_agreement(reviewers, column))]
    return Review(merged, conflicts, agreement)


def measure_agreement(reviewers: Sequence[Decisions], column: str) -> Agreement | None:
    """Return the agreement in a column; None if no clip has been decided by two reviewers."""
    samples = sorted({sample for decisions in reviewers for sample in decisions})
    values = [[decisions.get(sample, {}).get(column, "") for decisions in reviewers] for sample in samples]
    values = [row for row in values if sum(map(bool, row)) >= 2]
    if not values:
        return None
    categories = sorted({value for row in values for value in row if value})
    counts = np.array([[row.count(category) for category in categories] for row in values], dtype=np.float64)
    observed = _pair_agreement(counts)
    if len(reviewers) == 2:  # Cohen: each reviewer has frequencies of their own.
        frequencies = [[sum(row[index] == name for row in values) for name in categories] for index in range(2)]
        expected = float(np.prod(np.array(frequencies) / len(values), axis=0).sum())
    else:  # Fleiss, with weights for clips that not all reviewers have decided.
        expected = float(np.square(counts.sum(0) / counts.sum()).sum())
    kappa = (observed - expected) / (1 - expected) if expected < 1 else None
    return Agreement(column, len(values), 100 * observed, kappa)


def _pair_agreement(counts: np.ndarray) -> float:
    """Return the mean fraction of agreeing pairs of reviewers, from the counts of each category [n, C]."""
    raters = counts.sum(1)
    return float(((counts * (counts - 1)).sum(1) / (raters * (raters - 1))).mean())


def review_to_json(review: Review) -> dict[str, Any]:
    """Return the agreement and the conflicts as JSON values."""
    return {
        "agreement": [asdict(result) for result in review.agreement],
        "conflicts": [asdict(conflict) for conflict in review.conflicts],
    }


def review_from_json(values: dict[str, Any]) -> Review:
    """Return the review in a manifest, without the merged decisions."""
    agreement = [Agreement(**result) for result in values["agreement"]]
    return Review({}, [Conflict(**conflict) for conflict in values["conflicts"]], agreement)


def format_review(review: Review, num_reviewers: int, limit: int = 20) -> str:
    """Return the agreement and the conflicts as tables for stdout, with at most `limit` conflicts."""
    kappa = "Cohen's kappa" if num_reviewers == 2 else "Fleiss' kappa"
    parts: list[str] = []
    if review.agreement:
        rows = [
            (result.column, result.num_clips, result.percent, "–" if result.kappa is None else f"{result.kappa:.2f}")
            for result in review.agreement
        ]
        parts.append(format_table(("decided", "clips", "agreement, %", kappa), rows, numbers=(kappa,)))
    else:
        parts.append("agreement: no clip was decided by two reviewers")
    if review.conflicts:
        reviewers = [f"reviewer {number + 1}" for number in range(num_reviewers)]
        conflicts = [
            (
                conflict.key,
                conflict.column,
                *(value or "–" for value in conflict.values),
                f"majority: {conflict.merged}" if conflict.merged else "tie: unchanged",
            )
            for conflict in review.conflicts[:limit]
        ]
        parts.append(format_table(("conflict", "decided", *reviewers, "result"), conflicts))
    if len(review.conflicts) > limit:
        parts[-1] += f"\n... {len(review.conflicts) - limit} more conflicts"
    return "\n\n".join(parts)
