"""Precision of the audit rankings: the fraction of the first issues that are real, on datasets with ground truth.

Label issues are compared with cleanlab's ranking, which uses the same embeddings with cross-validated probabilities
(`tools.bench.noise.detection`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from omegaconf import OmegaConf

from distav.config.errors import UserError
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.distributed.environment import machine
from distav.evaluation.embedding import Embedder
from distav.tools.audit.issues import label_issues, last_correction, pair_issues
from tools.bench.noise.detection import out_of_sample_pred_probs

FIRST = (100, 500, 1000)
"""Numbers of top-ranked issues for which the precision is computed."""
_METHODS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def run(runs: Sequence[Path]) -> dict[str, Any]:
    """Measure finished runs on datasets with true labels and true pairs.

    Raises:
        UserError: if a run is not finished, or its dataset has no ground truth.
    """
    return {"machine": machine(), "rows": [_measure(path) for path in runs]}


def _measure(run: Path) -> dict[str, Any]:
    if not (run / "report.json").is_file():
        raise UserError(f"{run}: no report.json; specify the directory of a finished run.")
    data = OmegaConf.load(run / "config.yaml").data
    shards = ShardedDataset.open(data.root)
    split = shards.split(data.train_split)
    stored = load_labels(shards, split)
    given = load_labels(shards, split, data.label_overrides).given
    true = stored.given if stored.true is None and data.label_overrides else stored.true
    mismatched = stored.mismatched()
    if true is None or mismatched is None:
        raise UserError(f"{data.root}: no true labels and pairs; create the dataset with injected noise.")
    wrong = given != true
    table = last_correction(run, json.loads((run / "report.json").read_text()), split)
    embeddings = Embedder.open(run / "export", torch.device("cpu"), batch_size=128).embed_clips(split)
    pred_probs = out_of_sample_pred_probs(embeddings, given)
    rankings = {"distav": label_issues(table).ids}
    rankings |= {f"cleanlab, {method}": _rank(given, pred_probs, method) for method in _METHODS}
    pairs = pair_issues(table).ids
    return {
        "run": run.name,
        "wrong_labels": int(wrong.sum()),
        "mismatched_pairs": int(mismatched.sum()),
        "labels": {name: precision_of_first(wrong, ids) for name, ids in rankings.items()},
        "pairs": precision_of_first(mismatched, pairs),
    }


def precision_of_first(issues: np.ndarray, ids: np.ndarray) -> dict[str, float | None]:
    """Return the fraction of issues among the first clips of a ranking; None if the ranking has no clips."""
    return {str(first): float(issues[ids[:first]].mean()) if len(ids) else None for first in FIRST}


def _rank(given: np.ndarray, pred_probs: np.ndarray, method: str) -> np.ndarray:
    quality = get_label_quality_scores(given, pred_probs, method=method)
    return np.argsort(quality, kind="stable")


def table(results: dict[str, Any]) -> str:
    """Return the precision of every ranking as a Markdown table."""
    head = ["dataset", "ranking", *(f"first {first}" for first in FIRST)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        rankings = {f"labels, {name}": precision for name, precision in row["labels"].items()}
        rankings["pairs, distav"] = row["pairs"]
        for name, precision in rankings.items():
            fractions = (precision[str(first)] for first in FIRST)
            values = ("none listed" if fraction is None else f"{100 * fraction:.1f} %" for fraction in fractions)
            lines.append(f"| {' | '.join([row['run'].partition('_')[0], name, *values])} |")
    return "\n".join(lines)
