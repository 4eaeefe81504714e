"""How many of the first problems of an audit page are problems, where the set knows; labels beside cleanlab's ranking.

cleanlab ranks by the same embeddings, with cross-validated probabilities (`tools.bench.noise.detection`).
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
from distav.evaluation.embedding import Encoders
from distav.tools.audit.issues import corrections_of, label_issues, pair_issues
from tools.bench.noise.detection import out_of_sample_pred_probs
from tools.bench.timing import machine

FIRST = (100, 500, 1000)
_METHODS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def run(runs: Sequence[Path]) -> dict[str, Any]:
    """Measure finished runs on sets that know true labels and pairs.

    Raises:
        UserError: where a run is not finished, or its set does not know.
    """
    return {"machine": machine(), "rows": [_measured(each) for each in runs]}


def _measured(run: Path) -> dict[str, Any]:
    if not (run / "report.json").is_file():
        raise UserError(f"{run}: no report.json there; give the folder of a finished run.")
    data = OmegaConf.load(run / "config.yaml").data
    shards = ShardedDataset.open(data.root)
    split = shards.split(data.train_split)
    own, given = load_labels(shards, split), load_labels(shards, split, data.labels).given
    truth = own.given if own.true is None and data.labels else own.true
    wrong_pair = own.mismatched()
    if truth is None or wrong_pair is None:
        raise UserError(f"{data.root}: does not know which labels and pairs are wrong; make it with noise.")
    wrong = given != truth
    table = corrections_of(run, json.loads((run / "report.json").read_text()), split)
    embeddings = Encoders.open(run / "export", torch.device("cpu"), batch=128).of_clips(split)
    chances = out_of_sample_pred_probs(embeddings, given)
    ranked = {f"cleanlab, {name}": _order(given, chances, name) for name in _METHODS}
    found: dict[str, Any] = {"run": run.name, "wrong_labels": int(wrong.sum()), "wrong_pairs": int(wrong_pair.sum())}
    found["labels"] = {
        name: {str(first): float(wrong[order[:first]].mean()) for first in FIRST}
        for name, order in {"distav": label_issues(table).ids, **ranked}.items()
    }
    found["pairs"] = {str(first): float(wrong_pair[pair_issues(table).ids[:first]].mean()) for first in FIRST}
    return found


def _order(given: np.ndarray, chances: np.ndarray, method: str) -> np.ndarray:
    quality = get_label_quality_scores(given, chances, method=method)
    return np.argsort(quality, kind="stable")


def table(found: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    head = ["set", "list", *(f"of the first {first}" for first in FIRST)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found["rows"]:
        lists = {f"labels, {name}": shares for name, shares in row["labels"].items()} | {"pairs, distav": row["pairs"]}
        for name, shares in lists.items():
            cells = [row["run"].partition("_")[0], name, *(f"{100 * shares[str(first)]:.1f} %" for first in FIRST)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
