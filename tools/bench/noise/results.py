"""What the trainings of the noise benchmark came to: a record of each, the JSON file, mean and deviation over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.data.files import write_atomically
from tools.bench.noise.experiments import MOST_PAIRS, Job
from tools.bench.noise.runner import Bench
from tools.bench.timing import machine

KEYS = ("set", "labels", "pairs", "method", "k", "second", "seed")
"""What tells one record from the others; those of trainings have no k, those of votes no method and no pairs."""


def votes(bench: Bench, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return how right votes are by the number of neighbours, after each phase 1 with mismatched pairs."""
    from tools.bench.noise.knn_sweep import sweep

    noises = sorted({job.cell.labels for job in jobs if job.cell.labels.startswith("symmetric")})
    found = []
    for start in dict.fromkeys(job.phase_1 for job in jobs if job.phase_1 and job.cell.pairs == MOST_PAIRS):
        run = bench.work / "runs" / start.name if start else None
        if start and run and (run / "export").exists():
            place = {"set": start.cell.set, "seed": start.seed}
            swept = sweep(run, bench.shards(start.cell, start.seed), noises, start.seed)
            found += [place | _rounded(each) for each in swept]
    return found


def trainings(bench: Bench, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return the figures of each training that is done."""
    found = []
    for job in jobs:
        if bench.result_path(job).exists():
            cell = job.cell
            place = {
                "set": cell.set,
                "labels": cell.labels,
                "pairs": cell.pairs,
                "method": job.method,
                "seed": job.seed,
            }
            found.append(place | _rounded(_figures(json.loads(bench.result_path(job).read_text()))))
    return found


def over_seeds(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each place of the grid: mean and standard deviation of what all of its seeds have told."""
    groups: dict[tuple[tuple[str, Any], ...], list[Mapping[str, Any]]] = {}
    for record in records:
        place = tuple((key, record[key]) for key in KEYS[:-1] if key in record)
        groups.setdefault(place, []).append(record)
    return [
        dict(place)
        | {"seeds": len(found)}
        | {key: _spread([each[key] for each in found]) for key in found[0] if _in_all(key, found)}
        for place, found in groups.items()
    ]


def stored(path: Path) -> dict[str, Any]:
    """Return what a JSON file of this benchmark holds, nothing where it is not there.

    Raises:
        UserError: where it is something else.
    """
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"--json={path}: is damaged ({error}); delete it or name another file.") from None
    if found and "machines" not in found:
        raise UserError(f"--json={path}: holds no records of trainings; delete it or name another file.")
    return found


def save(found: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> dict[str, list[dict[str, Any]]]:
    """Add records to a JSON file, a line each, with the machine and the versions that they were made on.

    Records that the file has already, from other seeds, parts or machines, stay; the same made again take their place.

    Returns:
        Everything that the file now holds.

    Raises:
        UserError: where the file is something else.
    """
    before = stored(path)
    machines = [each for each in before.get("machines", []) if each != machine()] + [machine()]
    parts = ['"benchmark": "noise"', '"machines": [\n' + ",\n".join(map(json.dumps, machines)) + "\n]"]
    together: dict[str, list[dict[str, Any]]] = {}
    for name, records in found.items():
        kept = {tuple(each.get(key) for key in KEYS): each for each in [*before.get(name, []), *records]}
        together[name] = list(kept.values())
        parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, together[name])) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("{" + ",\n".join(parts) + "}\n").encode())
    return together


def _figures(report: dict[str, Any]) -> dict[str, float]:
    found = {f"test_{key}": value if key == "rsum" else 100 * value for key, value in report["test"].items()}
    if report.get("correspondence"):
        last = report["correspondence"][-1]
        found |= {f"pairs_{key}": 100 * value for key, value in last.items() if key.startswith("auroc")}
    for each in report["phases"]:
        key = f"seconds_{each['kind']}"
        found[key] = found.get(key, 0.0) + each["seconds"]
    found["seconds"] = sum(each["seconds"] for each in report["phases"])
    found |= {key: 100 * value for key, value in report.get("detection", {}).items()}
    for number, each in enumerate(report.get("corrections", [])):
        last = number + 1 == len(report["corrections"])
        name = "last" if last else str(number + 1)
        found[f"label_rate_{name}"] = 100 * each["label_noise_rate"]["estimate"]
        found[f"pair_rate_{name}"] = 100 * each["pair_mismatch_rate"]["estimate"]
        found[f"changed_{name}"] = 100 * each["changed_fraction"]
        for key, value in each.get("label_accuracy", {}).items():
            if value is not None:
                found[f"labels_{key}_{name}"] = 100 * value
        for key, value in each.get("pair_auroc", {}).items():
            if value is not None and math.isfinite(value):
                found[f"auroc_{key}_{name}"] = 100 * value
    return found


def _in_all(key: str, records: Sequence[Mapping[str, Any]]) -> bool:
    return key not in KEYS and all(key in each for each in records)


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}


def _spread(values: list[float]) -> dict[str, float | None]:
    deviation = round(statistics.stdev(values), 3) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 3), "sd": deviation}
