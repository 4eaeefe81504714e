"""Command `scaling` of tools/bench.py."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from distav.config.errors import UserError
from distav.data.files import write_atomically
from tools.bench.scaling import report
from tools.bench.timing import Results

MEASURED = ("steps", "costs")
"""Parts that are measured."""
MAX_ERROR, MAX_POINTS = 0.15, 5
"""Largest relative error of a predicted step, and of an efficiency of the published table in percentage points."""
AIMS = {128: 0.95, 1024: 0.88}
"""Efficiencies relative to 8 GPUs that are aimed at, by number of GPUs."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of tools/bench.py."""
    parser = commands.add_parser(
        "scaling",
        help="simulated training steps on many ranks, compared with measured and published ones",
        description="Measure steps of 1, 2 and 4 ranks on this machine and predict them from separate measurements; "
        "fit a published scaling table; and predict configs/multinode.yaml on up to 1,024 GPUs.",
    )
    add = parser.add_argument
    meaning = "parts to measure; others are read from --json. steps: training steps, which need an idle machine of two "
    meaning += "cores or more; costs: loss and nearest neighbors; none: predictions only"
    add("--parts", nargs="+", choices=(*MEASURED, "none"), default=MEASURED, help=meaning)
    add("--clips", type=int, default=16, help="clips of a rank and step of the measured steps (16)")
    add("--rounds", type=int, default=3, help="number of measured rounds; the least disturbed one counts (3)")
    add("--json", type=Path, help="JSON file for all results")


def execute(options: argparse.Namespace) -> int:
    """Run the benchmark and print the tables; returns the exit status: 3 if a threshold failed.

    Raises:
        UserError: for invalid options or an unreadable file.
    """
    for name, minimum in (("clips", 2), ("rounds", 1)):
        if getattr(options, name) < minimum:
            raise UserError(f"--{name}={getattr(options, name)}: allowed: {minimum} or more.")
    record = _stored(options.json)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in MEASURED:
            if name in options.parts:
                record[name] = _measure(name, options)
    finally:
        torch.set_num_threads(num_threads)
    record |= {"benchmark": "scaling", **predictions()}
    outcome = results(record)
    record["ratios"] = outcome.ratios
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, (json.dumps(record, indent=1) + "\n").encode())
    print(report.section(record))
    print(outcome.table())
    return 3 if any(ratio.get("passed") is False for ratio in outcome.ratios.values()) else 0


def _stored(path: Path | None) -> dict[str, Any]:
    """Return the measured parts of an earlier run.

    Raises:
        UserError: if the file has another format.
    """
    if path is None or not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {name: stored[name] for name in MEASURED if name in stored}
    except (ValueError, TypeError) as error:
        raise UserError(f"--json={path}: not a JSON file of this benchmark ({error}); choose another one.") from error


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    from tools.bench.scaling import costs, step_benchmark

    return step_benchmark.run(options.clips, options.rounds) if name == "steps" else costs.run(options.rounds)


def predictions() -> dict[str, Any]:
    """Return the parts that are computed: the fit to the published table, and the cluster."""
    from tools.bench.scaling import cluster, published

    constants = published.fit()
    return {"published": published.record(constants), "cluster": cluster.run(constants)}


def results(record: dict[str, Any]) -> Results:
    """Return the ratios of a record that have thresholds."""
    outcome = Results("scaling", {})
    for row in record.get("steps", {}).get("rows", []):
        place = f"{row['case']}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}"
        outcome.add_ratio(f"{place}: |predicted / measured - 1|", abs(row["error"]), f"<= {MAX_ERROR}")
        if row["ranks"] > 1:
            difference = abs(row["recorded_bytes"] / row["sent_bytes"] - 1)
            outcome.add_ratio(f"{place}: bytes of collectives, |recorded / predicted - 1|", difference, "<= 0.01")
    errors = [abs(error) for row in record["published"]["rows"] for error in row["errors"]]
    outcome.add_ratio("published table: largest error of an efficiency, points", max(errors), f"<= {MAX_POINTS}")
    for row in record["cluster"]["rows"]:
        if aim := AIMS.get(row["gpus"]):
            outcome.add_ratio(f"8 to {row['gpus']:,} GPUs: predicted efficiency", row["efficiency"], f">= {aim}")
    return outcome
