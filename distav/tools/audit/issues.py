"""Ranked issues of a dataset, and the nearest neighbors of the listed clips.

Legend: N training clips, I issues, k neighbors.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distav.config.errors import UserError, format_list
from distav.data.dataset import Split
from distav.data.files import read_table
from distav.evaluation.embedding import Embeddings, normalize_rows
from distav.evaluation.metrics import MISMATCH_THRESHOLD
from distav.memory.knn import nearest_neighbors
from distav.memory.neighbor_search import MAX_K

KINDS = ("label", "pair", "duplicate", "leak", "off_topic", "media")
"""Types of issues, in the order of the lists of the page."""
COLUMNS = (
    "id",
    "key",
    "given_label",
    "corrected_label",
    "knn_label",
    "confidence",
    "self_confidence",
    "correspondence",
)
"""Columns of a labels table that the audit needs."""


@dataclass(frozen=True)
class Issues:
    """Clips with an issue of one type, in order of decreasing score.

    Attributes:
        kind: one of `KINDS`.
        ids: [I] int64 clips.
        scores: [I] from 0 to 1: the probability that the label or the pair is wrong, or the severity of another issue.
        total: number of clips with such an issue, including those that are not listed; None if it was not searched.
        notes: what the issue of each clip is, I texts; empty for labels and pairs, which the page describes.
        matches: [I] int64 row of the clip that an issue refers to, training clips before test clips, or -1; None if no
            issue refers to another clip.
    """

    kind: str
    ids: np.ndarray
    scores: np.ndarray
    total: int | None
    notes: list[str] = field(default_factory=list[str])
    matches: np.ndarray | None = None

    def first(self, limit: int) -> "Issues":
        """Return the first `limit` issues; all of them if `limit` is 0."""
        part = slice(limit or None)
        matches = None if self.matches is None else self.matches[part]
        return Issues(self.kind, self.ids[part], self.scores[part], self.total, self.notes[part], matches)

    def with_notes(self, notes: list[str], matches: np.ndarray | None = None) -> "Issues":
        """Return the same issues with notes and the clips that they refer to."""
        return replace(self, notes=notes, matches=matches)


def rank_issues(kind: str, scores: np.ndarray, is_issue: np.ndarray) -> Issues:
    """Rank the clips with an issue by their scores [N], equal scores by id; `is_issue` is [N] bool."""
    order = np.argsort(-scores, kind="stable")
    order = order[is_issue[order]]
    return Issues(kind, order, scores[order], len(order))


def label_issues(table: pa.Table) -> Issues:
    """Rank the clips whose k-NN label differs from the given label by one minus the self-confidence.

    The correction leaves some of these labels unchanged, since most given labels are right; a person can decide.
    """
    self_confidence = table.column("self_confidence").to_numpy().astype(np.float64)
    given, knn = np.array(table.column("given_label").to_pylist()), np.array(table.column("knn_label").to_pylist())
    return rank_issues("label", 1 - self_confidence, given != knn)


def pair_issues(table: pa.Table) -> Issues:
    """Rank the clips whose audio probably belongs to other video by one minus the correspondence probability."""
    correspondence = table.column("correspondence").to_numpy().astype(np.float64)
    return rank_issues("pair", 1 - correspondence, correspondence < MISMATCH_THRESHOLD)


def describe_no_issues(kind: str, has_signal: bool, searched: bool = True) -> str:
    """Return why a page lists no issues of a type, and what to do.

    Args:
        kind: one of `KINDS`.
        has_signal: whether the last correction found a label signal; without one, it leaves labels and pairs unchanged.
        searched: whether such issues were searched.
    """
    if not searched:
        return (
            "Silent, black, still and unreadable clips: not searched (--skip-media). To search them, run audit.py "
            "without this option."
        )
    if not has_signal and kind in KINDS[:2]:
        return (
            "The last label correction of this run found no label signal: the nearest neighbors of a clip predict its "
            "label no better than the class frequencies do. It left all labels and pairs unchanged, so there is "
            "nothing to review. Train with more epochs (phases.NAME.epochs) under another run.name, and run audit.py "
            "on that run."
        )
    return {
        "label": "No label issues: the held-out votes of the last label correction agree with every given label. No "
        "action is needed.",
        "pair": f"No pair issues: every clip has a correspondence probability of {MISMATCH_THRESHOLD:g} or more. No "
        "action is needed.",
        "duplicate": "No duplicates: no training clip is a copy or a near-duplicate of another one. No action is "
        "needed.",
        "leak": "No leaks: no training clip shares its source with a test clip or is a near-duplicate of one. No "
        "action is needed.",
        "off_topic": "No off-topic clips: no clip is far from all others with a label that its neighbors do not "
        "support. No action is needed.",
        "media": "No silent, black, still or unreadable clips. No action is needed.",
    }[kind]


def check_corrected(run: Path, report: dict[str, Any]) -> None:
    """Raise a UserError if a run corrected no labels, according to its report.json."""
    if not report.get("corrections"):
        raise UserError(
            f"{run}: no phase of this run corrected labels; add one of kind: label_correction, as in "
            "configs/quickstart.yaml."
        )


def last_correction(run: Path, report: dict[str, Any], split: Split) -> pa.Table:
    """Return the labels table of a run's last label correction.

    Args:
        run: directory of the run.
        report: its report.json.
        split: training split of the dataset.

    Raises:
        UserError: if the run corrected no labels, or the table belongs to another dataset.
    """
    check_corrected(run, report)
    path = run / "labels" / f"{report['corrections'][-1]['phase']}.parquet"
    table = read_table(path)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: missing columns {format_list(missing)}; this is not a table of a label correction.")
    if table.column("key").to_pylist() != split.keys.tolist():
        raise UserError(
            f"{path}: its keys are not those of split {split.name} of {split.root}; specify the run's dataset with "
            "--shards."
        )
    return table


def neighbors_of(embeddings: Embeddings, split: Split, ids: np.ndarray, k: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Find the clips that are most similar to given clips in each modality.

    Args:
        embeddings: embeddings of all clips of the split.
        split: the clips; clips of the same source video are excluded from each other's neighbors.
        ids: [I] clips to search neighbors for.
        k: number of neighbors.

    Returns:
        By modality: ids [I, k], -1 where there are fewer, and cosine similarities [I, k]. Clips without a modality have
        no neighbors in it.
    """
    groups = torch.from_numpy(split.source_codes)
    k = min(k, len(split) - 1, MAX_K)
    neighbors = {}
    for modality in ("visual", "audio"):
        rows = torch.from_numpy(normalize_rows(getattr(embeddings, modality)))
        valid = torch.from_numpy(embeddings.modality(modality)) & (rows.norm(dim=1) > 0)
        neighbor_ids, cosines = nearest_neighbors(rows, k, groups, valid, queries=torch.from_numpy(ids))
        # A clip without the modality has no neighbors in it.
        neighbors[modality] = neighbor_ids.masked_fill(~valid[ids][:, None], -1).numpy(), cosines.numpy()
    return neighbors
