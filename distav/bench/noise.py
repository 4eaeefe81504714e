"""How well a model and its labels come out of wrong labels and wrong pairs, beside simple baselines.

Digits seen and spoken, easy and degraded, at a grid of noise rates. Every method has the same towers, augmentation and
epochs on labels, and the same settings in every cell; the last epoch counts. Phase 1 looks at no label, so runs that
differ in their labels alone start from one phase 1.
"""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.bench.measure import machine
from distav.bench.noise_grid import METHODS, SETS, Cell, Job, file_name, grid
from distav.data.format import ShardSet, write_atomically, write_table
from distav.data.labels import load_labels
from distav.data.noise import LabelNoise, flip_labels
from distav.errors import UserError, listed

CONFIGS = Path(__file__).parents[2] / "configs"
PRELOADED = ("distav.train", "distav.run", "distav.phases.table", "distav.report", "deepspeed")


class Bench:
    """Runs the grid, several trainings at a time, and goes on where it was left."""

    def __init__(self, digits: Path, work: Path, overrides: Sequence[str] = ()):
        """Take the folder of the digits' files and the folder to work in."""
        self.digits, self.work, self.overrides = digits, work, tuple(overrides)
        for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "fsdd-recordings.tar.gz"):
            if not (digits / name).is_file():
                raise UserError(f"--digits={digits}: has no {name}; get MNIST's test files and FSDD's recordings.")

    def run(self, jobs: Iterable[Job], at_once: int) -> None:
        """Train what has no result yet; earlier jobs first, as soon as what they start from is there."""
        waiting = [job for job in jobs if not self.result_path(job).exists()]
        phase_1 = dict.fromkeys(job.phase_1 for job in waiting if job.phase_1)
        missing = [job for job in phase_1 if job and not self.result_path(job).exists()]
        waiting = _before_their_users(waiting, missing)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        running: dict[Job, tuple[ForkServerProcess, float]] = {}
        while waiting or running:
            ready = [job for job in waiting if job.phase_1 is None or self.result_path(job.phase_1).exists()]
            while ready and len(running) < at_once:
                job = ready.pop(0)
                waiting.remove(job)
                process = context.Process(target=_train, args=self.task(job))
                process.start()
                running[job] = process, time.monotonic()
            time.sleep(0.5)
            for job, (process, began) in list(running.items()):
                if process.is_alive():
                    continue
                del running[job]
                if process.exitcode:
                    raise UserError(f"{job.name} ended with status {process.exitcode}; see {self.log_path(job)}.")
                self.keep(job)
                print(f"{job.name}: {time.monotonic() - began:.0f} s, {len(waiting)} to go", flush=True)

    def task(self, job: Job) -> tuple[list[str], str, Path, Path, bool]:
        """Make what the training needs and return its command line, its log, and what to judge its correction by."""
        shards, labels = self.shards(job.cell, job.seed), self.labels(job.cell, job.seed)
        return self.arguments(job, shards, labels), str(self.log_path(job)), shards, labels, job.method == "distav"

    def arguments(self, job: Job, shards: Path, labels: Path) -> list[str]:
        """Return the command line of a training, whose phase 1 is put in place where another has done it."""
        config = CONFIGS / f"{METHODS.get(job.method, 'avdigits')}.yaml"
        if job.method == "phase 1":
            config = self.work / "phase_1.yaml"
            write_atomically(config, _only_phase_1().encode())
        folder = self.work / "runs" / job.name
        if job.phase_1 and not folder.exists():
            # Its checkpoint is one of this very run after the first phase: the label has had no part in it so far.
            shutil.copytree(self.work / "runs" / job.phase_1.name / "checkpoints", folder / "checkpoints")
        return [
            "--config", str(config), f"data.root={shards}", f"data.labels={labels}", f"run.root={self.work / 'runs'}",
            f"run.name={job.name}", f"run.seed={job.seed}", "run.device=cpu", "run.threads_per_rank=1",
            "run.keep_checkpoints=1", "monitor.media_clips=0", *self.overrides,
        ]  # fmt: skip

    def shards(self, cell: Cell, seed: int) -> Path:
        """Return the set of a cell, with right labels; it is rendered where it is not there yet."""
        out = self.work / "shards" / file_name(f"{cell.set}, pairs {cell.pairs:g}, seed {seed}")
        if not (out / "manifest.json").exists():
            from distav.making.command import main as make_shards

            status = make_shards([
                "digits", str(out), "--images", str(self.digits / "t10k-images-idx3-ubyte.gz"),
                "--image-labels", str(self.digits / "t10k-labels-idx1-ubyte.gz"),
                "--recordings", str(self.digits / "fsdd-recordings.tar.gz"), "--seed", str(seed),
                "--label-noise", "symmetric:0", "--correspondence-noise", str(cell.pairs), *SETS[cell.set],
            ])  # fmt: skip
            if status:
                raise UserError(f"{out}: the set could not be made.")
        return out

    def labels(self, cell: Cell, seed: int) -> Path:
        """Return the table of a cell's given labels."""
        path = self.work / "labels" / file_name(f"{cell.name}, seed {seed}.parquet")
        if not path.exists():
            shards = ShardSet.open(self.shards(cell, seed))
            right = load_labels(shards, shards.split("train"))
            noise = LabelNoise.parse(cell.labels)
            given = right.given
            if noise:
                given = flip_labels(right.given, len(right.classes), noise, np.random.default_rng([seed, 7]))
            path.parent.mkdir(parents=True, exist_ok=True)
            names = np.array(right.classes, dtype=object)
            write_table(path, pa.table({"id": np.arange(len(given)), "label": names[given]}))
        return path

    def keep(self, job: Job) -> None:
        """Store a training's figures, and let go of what they were made of."""
        folder = self.work / "runs" / job.name
        report = json.loads((folder / "report.json").read_text())
        if (folder / "detection.json").exists():
            report["detection"] = json.loads((folder / "detection.json").read_text())
        path = self.result_path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
        if job.method != "phase 1":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def result_path(self, job: Job) -> Path:
        """Where a training's figures are kept."""
        return self.work / "results" / f"{job.name}.json"

    def log_path(self, job: Job) -> Path:
        """Where a training writes what it says."""
        path = self.work / "logs" / f"{job.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def collect(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Return mean and standard deviation over the seeds that are done, for each cell and method."""
        groups: dict[tuple[Cell, str], list[dict[str, Any]]] = {}
        for job in jobs:
            if self.result_path(job).exists():
                report = json.loads(self.result_path(job).read_text())
                groups.setdefault((job.cell, job.method), []).append(_figures(report))
        return [
            {"set": cell.set, "labels": cell.labels, "pairs": cell.pairs, "method": method, "seeds": len(found)}
            | {key: _spread([each[key] for each in found]) for key in found[0] if all(key in each for each in found)}
            for (cell, method), found in groups.items()
        ]


def _before_their_users(jobs: list[Job], first: Sequence[Job | None]) -> list[Job]:
    ordered: list[Job] = []
    for job in jobs:
        if job.phase_1 in first and job.phase_1 not in ordered and job.phase_1:
            ordered.append(job.phase_1)
        ordered.append(job)
    return ordered


def _only_phase_1() -> str:
    """Return the recipe's text with the phases after the first left out."""
    lines = (CONFIGS / "avdigits.yaml").read_text().splitlines()
    return "\n".join(lines[: next(n for n, line in enumerate(lines) if "kind: contrastive" in line) + 1]) + "\n"


def _train(arguments: list[str], log: str, shards: Path, labels: Path, corrects: bool) -> None:
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from distav.train import main

    status = main(arguments)
    if corrects and not status:
        from distav.bench.detection import compare

        compare(Path(log).parents[1] / "runs" / Path(log).stem, shards, labels, "labels")
    sys.exit(status)


def _figures(report: dict[str, Any]) -> dict[str, float]:
    found = {f"test_{key}": 100 * value for key, value in report["test"].items()}
    found |= {f"seconds_{each['name']}": each["seconds"] for each in report["phases"]}
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


def _spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 3), "sd": round(deviation, 3)}


def run(digits: Path, work: Path, seeds: Sequence[int], sets: Sequence[str], at_once: int) -> list[dict[str, Any]]:
    """Run what is missing of the grid and return all of it.

    Raises:
        UserError: for unknown sets, missing files, or a training that fails.
    """
    unknown = set(sets) - set(SETS)
    if unknown:
        raise UserError(f"--sets: there is no '{min(unknown)}'; allowed: {listed(SETS)}.")
    jobs = [
        Job(cell, method, seed) for seed in seeds for cell, methods in grid() if cell.set in sets for method in methods
    ]
    bench = Bench(digits, work)
    with contextlib.suppress(KeyboardInterrupt):
        bench.run(jobs, at_once)
    return bench.collect(jobs)


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the table as JSON, with the machine and the versions."""
    facts = {"benchmark": "noise", "machine": machine(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())
