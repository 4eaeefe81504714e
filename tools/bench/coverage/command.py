"""Command `coverage` of tools/bench.py."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from distav.config.errors import UserError
from distav.data.files import write_atomically
from tools.bench.console_tables import from_markdown
from tools.bench.coverage import families, plots, stored, summary
from tools.bench.coverage.problem import CoverageProblem
from tools.bench.coverage.runner import WorkFile, run

QUICK_PROBLEMS = 40
QUICK_WORK = 2500 * 100
"""Largest problem of the quick mode, in units of `tools.bench.coverage.families.work`."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of tools/bench.py."""
    parser = commands.add_parser(
        "coverage",
        help="coverage of the estimated noise rates on synthetic problems with known truth",
        description="Correct the labels of synthetic problems, without training, and compare the estimates with the "
        "truth. Finished problems are kept, and a stopped run resumes as long as the code is the same.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of the problems; another seed has other parameters and samples (0)")
    add("--family", nargs="+", default=[], metavar="NAME", help=f"families: {', '.join(families.FAMILIES)} (all)")
    add("--problems", type=int, metavar="N", help="number of problems, taken from the families in turn (all)")
    add("--quick", action="store_true", help=f"{QUICK_PROBLEMS} small problems, unless --problems has another number")
    meaning = "score samples with known truth instead of synthetic problems: arrays " + ", ".join(stored.ARRAYS)
    add("--features", nargs="+", type=Path, default=[], metavar="FILE.npz", help=meaning)
    add("--jobs", type=int, default=2, help="number of processes of one thread each (2)")
    add("--work", type=Path, default=Path("runs/coverage"), help="directory for the scores of finished problems")
    add(
        "--finished",
        action="store_true",
        help="report the problems that a stopped run has finished, and score no others",
    )
    add("--baseline", type=Path, metavar="FILE", help="JSON file of another run; the table shows both, before → after")
    add("--json", type=Path, help="JSON file for the scores; a plot is written beside it as SVG")


def execute(options: argparse.Namespace) -> int:
    """Run the benchmark and print the tables; returns the exit status: 3 if a threshold failed.

    Raises:
        UserError: for invalid options or files, or corrections that failed.
    """
    for name, minimum in (("jobs", 1), ("problems", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name}={value}: allowed: {minimum} or more.")
    baseline = _load(options.baseline) if options.baseline else None
    rows = _stored_rows(options) if options.features else _problem_rows(options)
    arguments = {"seed": options.seed, "problems": len(rows)}
    outcome = summary.results(rows, arguments)
    if options.json:
        _save(rows, outcome.as_dict(), options.json)
    print(f"\n{from_markdown(summary.worst(rows))}\n\n{summary.LEGEND}\n")
    if baseline is not None:
        both, before = summary.common(rows, baseline)
        print(f"{from_markdown(summary.table(both, before))}\n\n{from_markdown(summary.changes(both, before))}\n")
    else:
        print(f"{from_markdown(summary.table(rows))}\n")
    print(outcome.table())
    return 3 if any(not ratio["passed"] for ratio in outcome.ratios.values()) else 0


def _problems(options: argparse.Namespace) -> list[CoverageProblem]:
    problems = families.problems(options.seed, options.family)
    number = options.problems or (QUICK_PROBLEMS if options.quick else len(problems))
    return families.subset(problems, number, QUICK_WORK if options.quick else float("inf"))


def _problem_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    problems, work_file = _problems(options), WorkFile(options.work, options.seed)
    if not options.finished:
        return run(problems, work_file, options.jobs)
    finished = work_file.load()
    rows = [finished[problem.name] for problem in problems if problem.name in finished]
    if not rows:
        raise UserError(f"--finished: {work_file.path} has none of these problems; omit the option to score them.")
    return rows


def _stored_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(options.jobs)
    try:
        return [stored.score_file(path) for path in options.features]
    finally:
        torch.set_num_threads(num_threads)


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--baseline={path}: not a readable JSON file ({error}).") from None
    if not isinstance(content, dict) or content.get("benchmark") != "coverage":
        raise UserError(f"--baseline={path}: no results of this benchmark; specify a file that --json has written.")
    return content["rows"]


def _save(rows: list[dict[str, Any]], content: dict[str, Any], path: Path) -> None:
    """Write the JSON file, one problem per line, and the plot."""
    content["families"] = {
        name: {title: None if math.isnan(value) else round(value, 5) for title, value in figures.items()}
        for name, figures in summary.summarize(rows).items()
    }
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "figures"]
    parts.append('"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("{" + ",\n".join(parts) + "}\n").encode())
    plots.save(rows, path.with_suffix(".svg"))
