"""Metrics of an evaluation over folds: means, standard deviations, the printed summary and the stored record."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from distav.distributed.collectives import get_world_size
from distav.distributed.environment import machine
from distav.models.pretrained import weights_digest

NOT_STORED = ("shards", "export", "json", "local_rank", "protocol")
"""Arguments that are no options of the evaluation, or stored under other names."""


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


def print_metrics(results: dict[str, Any]) -> None:
    """Print the metrics of `over_folds`, one line per task and modality."""
    folds = f" ({len(results['folds'])} folds)" if len(results["folds"]) > 1 else ""
    for task, values in results["metrics"].items():
        if not values:
            print(f"{task}: not possible, since no test clip has both modalities")
        spread = results.get("std", {}).get(task, {})
        lines: dict[str, list[str]] = {}
        for name, value in values.items():
            score, _, modality = name.rpartition("_")
            if modality not in ("visual", "audio", "both"):
                score, modality = name, ""
            lines.setdefault(modality, []).append(_text(score, value, spread.get(name)))
        for modality, texts in lines.items():
            print(f"{' '.join(filter(None, (task, modality)))}{folds}: {', '.join(texts)}")


def _text(name: str, value: float, std: float | None) -> str:
    if name == "rsum":
        return f"rSum {value:.1f} of 600"
    scale, unit, digits = (1, "", 2) if name.startswith("d_prime") else (100, " %", 1)
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    return f"{name} {scale * value:.{digits}f}{spread}{unit}"


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
