"""Results of the noise benchmark: a record of each training, the JSON file, mean and standard deviation over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.distributed.environment import machine
from tools.bench.noise.experiments import MAX_MISMATCH_RATE, Job
from tools.bench.noise.runner import Bench

KEYS = ("dataset", "label_noise", "mismatch_rate", "method", "k", "second_round_neighbors", "seed")
"""Fields that identify a record; records of trainings have no k, those of votes no method and no mismatch rate."""


def vote_records(bench: Bench, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return the accuracy of k-NN votes by number of neighbors, after each contrastive phase on mismatched pairs."""
    from tools.bench.noise.knn_sweep import sweep

    jobs = list(jobs)
    noises = sorted({job.cell.label_noise for job in jobs if job.cell.label_noise.startswith("symmetric")})
    shared = (job.pretraining for job in jobs if job.cell.mismatch_rate == MAX_MISMATCH_RATE)
    records = []
    for pretraining in dict.fromkeys(job for job in shared if job):
        run = bench.work / "runs" / pretraining.name
        if (run / "export").exists():
            fields = {"dataset": pretraining.cell.dataset, "seed": pretraining.seed}
            votes = sweep(run, bench.shards(pretraining.cell, pretraining.seed), noises, pretraining.seed)
            records += [fields | _rounded(vote) for vote in votes]
    return records


def training_records(bench: Bench, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return the figures of each finished training."""
    records = []
    for job in jobs:
        if bench.result_path(job).exists():
            fields = {
                "dataset": job.cell.dataset,
                "label_noise": job.cell.label_noise,
                "mismatch_rate": job.cell.mismatch_rate,
                "method": job.method,
                "seed": job.seed,
            }
            records.append(fields | _rounded(_figures(json.loads(bench.result_path(job).read_text()))))
    return records


def over_seeds(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each cell and method: mean and standard deviation of the figures that all of its seeds have."""
    groups: dict[tuple[tuple[str, Any], ...], list[Mapping[str, Any]]] = {}
    for record in records:
        fields = tuple((key, record[key]) for key in KEYS[:-1] if key in record)
        groups.setdefault(fields, []).append(record)
    return [
        dict(fields)
        | {"seeds": len(group)}
        | {key: _mean_and_sd([record[key] for record in group]) for key in group[0] if _is_common_figure(key, group)}
        for fields, group in groups.items()
    ]


def load(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of this benchmark, {} if it does not exist.

    Raises:
        UserError: if the file is of another kind.
    """
    try:
        stored = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"--json={path}: not a valid JSON file ({error}); delete it or choose another file.") from None
    if stored and "machines" not in stored:
        raise UserError(f"--json={path}: no results of the noise benchmark; delete the file or choose another one.")
    return stored


def save(
    records: Mapping[str, Sequence[dict[str, Any]]], path: Path, benchmark: str = "noise"
) -> dict[str, list[dict[str, Any]]]:
    """Add records to a JSON file, one per line, together with the machine and the package versions.

    Existing records of other seeds, experiments or machines are kept; records of the same training are replaced.

    Returns:
        All records of the file.

    Raises:
        UserError: if the file is of another kind.
    """
    stored = load(path)
    machines = [entry for entry in stored.get("machines", []) if entry != machine()] + [machine()]
    parts = [f'"benchmark": "{benchmark}"', '"machines": [\n' + ",\n".join(map(json.dumps, machines)) + "\n]"]
    merged: dict[str, list[dict[str, Any]]] = {}
    for name, added in records.items():
        by_key = {tuple(record.get(key) for key in KEYS): record for record in [*stored.get(name, []), *added]}
        merged[name] = list(by_key.values())
        parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, merged[name])) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("{" + ",\n".join(parts) + "}\n").encode())
    return merged


def _figures(report: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a run's report.json, rates in %."""
    test = {key: value for key, value in report["test"].items() if key != "by_class"}
    figures = {f"test_{key}": value if key == "rsum" else 100 * value for key, value in test.items()}
    if report.get("correspondence"):
        last = report["correspondence"][-1]
        figures |= {f"correspondence_{key}": 100 * value for key, value in last.items() if key.startswith("auroc")}
    for phase in report["phases"]:
        key = f"seconds_{phase['kind']}"
        figures[key] = figures.get(key, 0.0) + phase["seconds"]
    figures["seconds"] = sum(phase["seconds"] for phase in report["phases"])
    figures |= {key: 100 * value for key, value in report.get("detection", {}).items()}
    corrections = report.get("corrections", [])
    for number, correction in enumerate(corrections, 1):
        figures |= _correction_figures(correction, "last" if number == len(corrections) else str(number))
    return figures


def _correction_figures(correction: dict[str, Any], name: str) -> dict[str, float]:
    figures = {
        f"label_noise_rate_{name}": 100 * correction["label_noise_rate"]["estimate"],
        f"pair_mismatch_rate_{name}": 100 * correction["pair_mismatch_rate"]["estimate"],
        f"changed_fraction_{name}": 100 * correction["changed_fraction"],
    }
    titles = {"given": "given_label_accuracy", "corrected": "corrected_label_accuracy"}
    for key, value in correction.get("label_accuracy", {}).items():
        if value is not None:
            figures[f"{titles.get(key, key)}_{name}"] = 100 * value
    for key, value in correction.get("pair_auroc", {}).items():
        if value is not None and math.isfinite(value):
            figures[f"mismatch_auroc_{key}_{name}"] = 100 * value
    return figures


def _is_common_figure(key: str, records: Sequence[Mapping[str, Any]]) -> bool:
    return key not in KEYS and all(key in record for record in records)


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}


def _mean_and_sd(values: list[float]) -> dict[str, float | None]:
    deviation = round(statistics.stdev(values), 3) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 3), "sd": deviation}
