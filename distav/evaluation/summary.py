"""Metrics of an evaluation over folds: means, standard deviations, the printed summary and the stored record."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from distav.console import format_table
from distav.distributed.collectives import get_world_size
from distav.distributed.environment import machine
from distav.models.pretrained import weights_digest

NOT_STORED = ("shards", "export", "json", "local_rank", "protocol")
"""Arguments that are no options of the evaluation, or stored under other names."""
_MODALITIES = ("visual", "audio", "both")
"""Ends of the names of metrics of classification."""
_DIRECTIONS = {"v2a_": "video to audio", "a2v_": "audio to video"}
"""Beginnings of the names of metrics of retrieval, and their titles."""
_NO_PERCENTAGES = ("d_prime",)
"""Metrics that are no fractions."""


def over_folds(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of an evaluation.

    Args:
        folds: for each dataset its description and `metrics`, numbers by task and name.

    Returns:
        `metrics`, means over the folds that have the metric; `std`, their sample standard deviations, if there are
        several folds; and `folds`.
    """
    metrics: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, float]] = {}
    for task in folds[0]["metrics"]:
        names = dict.fromkeys(name for fold in folds for name in fold["metrics"][task])
        values = {
            name: [fold["metrics"][task][name] for fold in folds if name in fold["metrics"][task]] for name in names
        }
        metrics[task] = {name: statistics.fmean(numbers) for name, numbers in values.items()}
        spread[task] = {name: statistics.stdev(numbers) for name, numbers in values.items() if len(numbers) > 1}
    return {"metrics": metrics, **({"std": spread} if len(folds) > 1 else {}), "folds": folds}


def format_metrics(results: dict[str, Any]) -> str:
    """Return the metrics of `over_folds` as tables: one of classification and one of retrieval."""
    metrics, spread = results["metrics"], results.get("std", {})
    parts = [f"Mean ± standard deviation over {len(results['folds'])} folds:"] if spread else []
    texts = {
        task: {name: _text(name, value, spread.get(task, {}).get(name)) for name, value in values.items()}
        for task, values in metrics.items()
    }
    classification = {
        (task, modality): _without_affix(texts[task], suffix=f"_{modality}")
        for task in texts
        if task != "retrieval"
        for modality in _MODALITIES
    }
    if any(classification.values()):
        parts.append(_format_rows(("task", "modality"), classification))
    if retrieval := texts.get("retrieval"):
        directions = {(title,): _without_affix(retrieval, prefix=prefix) for prefix, title in _DIRECTIONS.items()}
        parts.append(_format_rows(("retrieval",), directions))
        parts[-1] += f"\nrSum {retrieval['rsum']} of 600"
    elif "retrieval" in texts:
        parts.append("retrieval: not possible, since no test clip has both modalities")
    return "\n\n".join(parts)


def _without_affix(texts: dict[str, str], prefix: str = "", suffix: str = "") -> dict[str, str]:
    """Return the texts whose names have a prefix and a suffix, by the names without them."""
    return {
        name.removeprefix(prefix).removesuffix(suffix): text
        for name, text in texts.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _format_rows(names: tuple[str, ...], rows: dict[tuple[str, ...], dict[str, str]]) -> str:
    """Return a table with a column per metric, given the texts of the metrics by the first cells of the rows."""
    metrics = list(dict.fromkeys(metric for texts in rows.values() for metric in texts))
    heads = [metric if metric in _NO_PERCENTAGES else f"{metric}, %" for metric in metrics]
    cells = [(*first, *(texts.get(metric, "") for metric in metrics)) for first, texts in rows.items() if texts]
    return format_table((*names, *heads), cells, numbers=heads)


def _text(name: str, value: float, std: float | None) -> str:
    scale = 1 if name.startswith(_NO_PERCENTAGES) or name == "rsum" else 100
    digits = 2 if name.startswith(_NO_PERCENTAGES) else 1
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}"


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is needed to repeat an evaluation: options, protocol, weights, machine and versions."""
    stored = {key: value for key, value in vars(options).items() if key not in NOT_STORED}
    return {
        "protocol": options.protocol,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in stored.items()},
        "weights": {"export": str(options.export), "sha256": weights_digest(options.export)},
        "ranks": get_world_size(),
        "machine": machine(),
    }
