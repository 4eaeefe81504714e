"""What the trainings of the noise benchmark came to: mean and standard deviation over seeds, and the JSON file."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distav.bench.measure import machine
from distav.bench.noise.grid import MOST_PAIRS, Cell, Job
from distav.bench.noise.runner import Bench
from distav.data.format import write_atomically


def votes(bench: Bench, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return how right votes are by the number of neighbours, after each phase 1 with mismatched pairs."""
    from distav.bench.noise.votes import sweep

    noises = sorted({job.cell.labels for job in jobs if job.cell.labels.startswith("symmetric")})
    groups: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}
    for start in dict.fromkeys(job.phase_1 for job in jobs if job.phase_1 and job.cell.pairs == MOST_PAIRS):
        run = bench.work / "runs" / start.name if start else None
        if start and run and (run / "export").exists():
            for each in sweep(run, bench.shards(start.cell, start.seed), noises, start.seed):
                place = start.cell.set, each["labels"], each["k"], each["second"]
                groups.setdefault(place, []).append({key: each[key] for key in ("right", "nats")})
    return [
        {"set": name, "labels": labels, "k": k, "second": second, "seeds": len(found)}
        | {key: _spread([each[key] for each in found]) for key in found[0]}
        for (name, labels, k, second), found in groups.items()
    ]


def trainings(bench: Bench, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over the seeds that are done, for each cell and method."""
    groups: dict[tuple[Cell, str], list[dict[str, Any]]] = {}
    for job in jobs:
        if bench.result_path(job).exists():
            report = json.loads(bench.result_path(job).read_text())
            groups.setdefault((job.cell, job.method), []).append(_figures(report))
    return [
        {"set": cell.set, "labels": cell.labels, "pairs": cell.pairs, "method": method, "seeds": len(found)}
        | {key: _spread([each[key] for each in found]) for key in found[0] if all(key in each for each in found)}
        for (cell, method), found in groups.items()
    ]


def save(found: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Write the tables as JSON, a line a row, with the machine and the versions."""
    parts = ['"benchmark": "noise"', f'"machine": {json.dumps(machine())}']
    for name, rows in found.items():
        parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("{" + ",\n".join(parts) + "}\n").encode())


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
        found[f"label_rate_{name}"] = 100 * each["label_noise"]["rate"]
        found[f"pair_rate_{name}"] = 100 * each["pair_noise"]["rate"]
        found[f"changed_{name}"] = 100 * each["changed"]
        for key, value in each.get("label_accuracy", {}).items():
            if value is not None:
                found[f"labels_{key}_{name}"] = 100 * value
        for key, value in each.get("pair_auroc", {}).items():
            if value is not None and math.isfinite(value):
                found[f"auroc_{key}_{name}"] = 100 * value
    return found


def _spread(values: list[float]) -> dict[str, float | None]:
    deviation = round(statistics.stdev(values), 3) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 3), "sd": deviation}
