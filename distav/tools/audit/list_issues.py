"""Label issues of a multi-label dataset: pairs of a clip and a class whose label is probably missing or wrong.

Legend: N training clips, C classes, I issues.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, format_list
from distav.data.annotations.multi_labels import class_matrix
from distav.data.dataset import Split
from distav.data.files import read_table

LIST_KINDS = ("missing", "wrong")
"""Types of issues, in the order of the lists of the page."""
COLUMNS = ("id", "key", "given_label", "corrected_label", "held_out", "posterior")
"""Columns of a labels table that the audit needs."""
_VOTE = 0.5
"""Held-out probability of a class from which the votes differ from a missing label, or below which from a given one."""


@dataclass(frozen=True)
class ListTable:
    """Labels table of a correction of label lists.

    Attributes:
        table: the table.
        given, corrected: [N, C] bool.
        held_out, posterior: [N, C] float32 probabilities of the classes.
    """

    table: pa.Table
    given: np.ndarray
    corrected: np.ndarray
    held_out: np.ndarray
    posterior: np.ndarray

    @classmethod
    def read(cls, path: Path, split: Split, classes: list[str]) -> "ListTable":
        """Read a labels table.

        Args:
            path: the file.
            split: training split of the dataset.
            classes: class names.

        Raises:
            UserError: if it is not the table of a correction of this dataset.
        """
        table = read_table(path)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise UserError(
                f"{path}: missing columns {format_list(missing)}; this is not a table of a correction of label lists."
            )
        if table.column("key").to_pylist() != split.keys.tolist():
            raise UserError(
                f"{path}: its keys are not those of split {split.name} of {split.root}; specify the run's dataset with "
                "--shards."
            )
        given, corrected = (
            class_matrix(table.column(name).to_pylist(), classes, str(path))
            for name in ("given_label", "corrected_label")
        )
        probs = [np.array(table.column(name).to_pylist(), dtype=np.float32) for name in ("held_out", "posterior")]
        if any(values.shape != given.shape for values in probs):
            raise UserError(f"{path}: held_out and posterior do not have {len(classes)} numbers per clip.")
        return cls(table, given, corrected, *probs)


@dataclass(frozen=True)
class ListIssues:
    """Pairs of a clip and a class with an issue of one type, in order of decreasing score.

    Attributes:
        kind: one of `LIST_KINDS`.
        ids: [I] int64 clips.
        columns: [I] int64 classes.
        scores: [I] probability that the label is missing or wrong.
        total: number of issues, including those that are not listed.
    """

    kind: str
    ids: np.ndarray
    columns: np.ndarray
    scores: np.ndarray
    total: int

    def first(self, limit: int) -> "ListIssues":
        """Return the first `limit` issues; all of them if `limit` is 0."""
        part = slice(limit or None)
        return ListIssues(self.kind, self.ids[part], self.columns[part], self.scores[part], self.total)


def find_list_issues(table: ListTable) -> list[ListIssues]:
    """Return the missing and the wrong labels, ranked by their probability.

    A label is listed if the held-out votes or the posterior contradict it. The correction leaves some of these labels
    unchanged; a person can decide.
    """
    likely = np.maximum(table.held_out, table.posterior) > _VOTE
    unlikely = np.minimum(table.held_out, table.posterior) < _VOTE
    return [
        _rank("missing", table.posterior, ~table.given & likely),
        _rank("wrong", 1 - table.posterior, table.given & unlikely),
    ]


def _rank(kind: str, scores: np.ndarray, is_issue: np.ndarray) -> ListIssues:
    """Rank the pairs with an issue by their scores [N, C], equal scores by clip and class."""
    ids, columns = np.nonzero(is_issue)
    order = np.argsort(-scores[ids, columns], kind="stable")
    ids, columns = ids[order], columns[order]
    return ListIssues(kind, ids, columns, scores[ids, columns].astype(np.float64), len(ids))


def list_issue_table(issues: list[ListIssues], table: ListTable, split: Split, classes: list[str]) -> pa.Table:
    """Return one row per issue.

    Columns: `split`, `id`, `key`, `source`, `class`, `issue` (`missing` or `wrong`), `score`, `held_out`, `posterior`,
    and the lists `given_label` and `corrected_label` with classes separated by `|`.
    """
    rows: list[dict[str, Any]] = []
    given, corrected = (table.table.column(name).to_pylist() for name in ("given_label", "corrected_label"))
    for ranked in issues:
        for sample, column, score in zip(ranked.ids.tolist(), ranked.columns.tolist(), ranked.scores, strict=True):
            rows.append(
                {
                    "split": split.name,
                    "id": sample,
                    "key": str(split.keys[sample]),
                    "source": str(split.sources[sample]),
                    "class": classes[column],
                    "issue": ranked.kind,
                    "score": float(score),
                    "held_out": float(table.held_out[sample, column]),
                    "posterior": float(table.posterior[sample, column]),
                    "given_label": "|".join(given[sample]),
                    "corrected_label": "|".join(corrected[sample]),
                }
            )
    texts = ("split", "key", "source", "class", "issue", "given_label", "corrected_label")
    types = {name: pa.string() for name in texts} | {"id": pa.int64()}
    names = list(rows[0]) if rows else [*texts, "id", "score", "held_out", "posterior"]
    schema = pa.schema([(name, types.get(name, pa.float32())) for name in names])
    return pa.Table.from_pylist(rows, schema)


def describe_no_list_issues(kind: str, has_signal: bool) -> str:
    """Return why a page lists no issues of a type, and what to do."""
    if not has_signal:
        return (
            "The last label correction of this run found no label signal: the nearest neighbors of a clip predict its "
            "labels no better than the class frequencies do. It left all labels unchanged, so there is nothing to "
            "review. Train with more epochs (phases.NAME.epochs) under another run.name, and run audit.py on that run."
        )
    return f"No {kind} labels: the votes of the last label correction agree with all given lists. No action is needed."
