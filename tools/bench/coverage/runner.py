"""Scores many problems in parallel; scores are kept in a work file, so that a stopped run resumes."""

import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

import distav
from distav.config.errors import UserError
from distav.console import show_progress
from tools.bench.coverage.families import work
from tools.bench.coverage.problem import CoverageProblem
from tools.bench.coverage.scores import score_problem

MEASURED_SOURCES = ("noise/*.py", "config/phases.py", "memory/knn.py", "evaluation/metrics.py")
"""Modules of distav that the scores depend on."""
HARNESS_SOURCES = (
    "problem.py",
    "features.py",
    "labels.py",
    "generator.py",
    "families.py",
    "correction.py",
    "reference.py",
    "scores.py",
)
"""Modules of this package that the scores depend on."""


def fingerprint() -> str:
    """Return a hash of all sources that the scores depend on; scores of other versions are not reused."""
    package = Path(str(distav.__file__)).parent
    files = [path for pattern in MEASURED_SOURCES for path in sorted(package.glob(pattern))]
    files += [Path(__file__).parent / name for name in HARNESS_SOURCES]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


class WorkFile:
    """Scores of the finished problems of a seed, one JSON object per line."""

    def __init__(self, directory: Path, seed: int):
        """Open the file for this version of the sources; scores of other versions are in other files."""
        self.path = directory / f"seed-{seed}-{fingerprint()}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[str, dict[str, Any]]:
        """Return the scores by the name of the problem; a last line that was not written completely is ignored."""
        rows = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["name"]] = row
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Append the scores of a problem."""
        with self.path.open("a") as file:
            file.write("\n" * self._is_incomplete() + json.dumps(row) + "\n")

    def _is_incomplete(self) -> bool:
        """Return whether the last line was not written completely."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return bool(content) and not content.endswith(b"\n")


def run(problems: Sequence[CoverageProblem], work_file: WorkFile, num_jobs: int) -> list[dict[str, Any]]:
    """Score the problems that the work file does not have, smallest first, in processes of one thread each.

    Args:
        problems: problems.
        work_file: finished problems.
        num_jobs: number of processes.

    Returns:
        Scores in the order of the problems.

    Raises:
        UserError: if corrections failed, after all other problems are scored.
    """
    finished = work_file.load()
    pending = sorted((problem for problem in problems if problem.name not in finished), key=work)
    failed: dict[str, BaseException] = {}
    if pending:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(num_jobs, len(pending)), context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            try:
                _collect(
                    {pool.submit(score_problem, problem): problem for problem in pending}, work_file, finished, failed
                )
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if failed:
        reasons = [f"{name}: {type(error).__name__}: {error}" for name, error in failed.items()]
        raise UserError("\n".join([f"{len(failed)} problems failed; the scores of all others are kept.", *reasons]))
    return [finished[problem.name] for problem in problems]


def _collect(
    running: dict[Future[dict[str, Any]], CoverageProblem],
    work_file: WorkFile,
    finished: dict[str, dict[str, Any]],
    failed: dict[str, BaseException],
) -> None:
    """Store the scores of each problem as soon as they are there."""
    total = len(running)
    waiting = set(running)
    with show_progress(total, "problems", "coverage", is_logged=True) as counter:
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                counter.advance()
                problem, error = running[future], future.exception()
                if error is not None:
                    failed[problem.name] = error
                    print(f"{problem.name}: failed: {error}", flush=True)
                    continue
                row = future.result()
                finished[problem.name] = row
                work_file.add(row)
                print(f"{_line(row)}; {len(waiting)} of {total} left", flush=True)


def _line(row: dict[str, Any]) -> str:
    """Return the rates of a problem in one line."""
    rates = [
        f"{title} {100 * rate['true']:.1f} % estimated {100 * rate['estimate']:.1f} % "
        f"[{100 * rate['ci95_low']:.1f}, {100 * rate['ci95_high']:.1f}]{'' if rate['covered'] else ' MISSED'}"
        for title, rate in (("labels", row["label_rate"]), ("pairs", row["pair_rate"]))
    ]
    return f"{row['name']} ({row['num_samples']} samples, {row['num_classes']} classes): " + ", ".join(rates)
