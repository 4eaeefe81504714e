"""What looks wrong in a set, ranked, each with the clips that it looks and sounds like.

Legend: N training clips, p problems, k neighbours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distav.config.errors import UserError, format_list
from distav.data.dataset import Split
from distav.data.files import read_table
from distav.evaluation.embedding import Embeddings, unit
from distav.memory.knn import LARGEST_K, nearest_neighbors

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
MISMATCH_THRESHOLD = 0.5
"""Pairs that are less probable than this look wrong."""


@dataclass(frozen=True)
class Issues:
    """Clips that look wrong in one way, the surest first.

    Attributes:
        kind: `label` or `pair`.
        ids: [p] int64.
        scores: [p] how probable it is that they are wrong.
        total: clips that look wrong in all.
    """

    kind: str
    ids: np.ndarray
    scores: np.ndarray
    total: int

    def first(self, most: int) -> "Issues":
        """Return the surest ones; all of them where `most` is 0."""
        return Issues(self.kind, self.ids[: most or None], self.scores[: most or None], self.total)


def ranked(kind: str, scores: np.ndarray, wrong: np.ndarray) -> Issues:
    """Rank what is said to be wrong by its scores, equal ones by id: [N] each."""
    order = np.argsort(-scores, kind="stable")
    order = order[wrong[order]]
    return Issues(kind, order, scores[order], len(order))


def label_issues(table: pa.Table) -> Issues:
    """Rank the clips whose neighbours voted for another label by how little of their votes went to the given one.

    Some of these the correction leaves as they are, since most given labels are right; a person can tell.
    """
    agreement = table.column("self_confidence").to_numpy().astype(np.float64)
    given, voted = (np.array(table.column(name).to_pylist()) for name in ("given_label", "knn_label"))
    return ranked("label", 1 - agreement, given != voted)


def pair_issues(table: pa.Table) -> Issues:
    """Rank the clips whose sound and picture probably do not belong together."""
    correspondence = table.column("correspondence").to_numpy().astype(np.float64)
    return ranked("pair", 1 - correspondence, correspondence < MISMATCH_THRESHOLD)


def corrections_of(run: Path, report: dict[str, Any], split: Split) -> pa.Table:
    """Return the last table of labels that a run wrote.

    Raises:
        UserError: where it corrected nothing, or the table is not of this set.
    """
    if not report.get("corrections"):
        raise UserError(f"{run}: no phase of this run corrected labels; add one of kind correction, as in quickstart.")
    path = run / "labels" / f"{report['corrections'][-1]['phase']}.parquet"
    table = read_table(path)
    if "voted" not in table.column_names and "corrected" in table.column_names:  # of a distav that told less
        table = table.append_column("voted", table.column("corrected"))
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: lacks {format_list(missing)}; it is no table of a correction.")
    if table.column("key").to_pylist() != split.keys.tolist():
        raise UserError(f"{path}: its keys are not those of split {split.name} of {split.root}; give its own --shards.")
    return table


def neighbors_of(embeddings: Embeddings, split: Split, ids: np.ndarray, k: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Find the clips that look, and those that sound, like others.

    Args:
        embeddings: of the whole split.
        split: its clips; those of one video are not each other's neighbours.
        ids: [p] whose neighbours are wanted.
        k: how many.

    Returns:
        By modality: ids [p, k], -1 where there are fewer, and cosines [p, k].
    """
    groups = torch.from_numpy(split.source_codes)
    k = min(k, len(split) - 1, LARGEST_K)
    found = {}
    for modality in ("visual", "audio"):
        rows = torch.from_numpy(unit(getattr(embeddings, modality)))
        valid = torch.from_numpy(embeddings.valid) & (rows.norm(dim=1) > 0)
        near, cosines = nearest_neighbors(rows, k, groups, valid, queries=torch.from_numpy(ids))
        found[modality] = near.numpy(), cosines.numpy()
    return found
