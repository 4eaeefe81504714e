"""Trainings of the noise benchmark: accuracy under label noise and mismatched audio, compared with baselines.

Digits, easy and degraded, or natural datasets, at a grid of noise rates. Every method has the same towers,
augmentation and number of epochs on labels, and the same settings in every cell; the model of the last epoch is
evaluated. The contrastive phase uses no labels, so runs that differ only in their labels share it.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.config import loading
from distav.config.errors import UserError
from distav.console import show_progress
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.files import write_atomically, write_table
from distav.data.preparation.noise_injection import LabelNoise, flip_labels
from tools.bench.noise.datasets import BenchDataset
from tools.bench.noise.experiments import ABLATIONS, PRETRAINING, Cell, Job, file_name

CONFIGS = Path(__file__).parents[3] / "configs"
PRELOADED = (
    "distav.train",
    "distav.training.run",
    "distav.training.phases.registry",
    "distav.training.report",
    "deepspeed",
)


class Bench:
    """Runs trainings in parallel and keeps their results, so that a stopped benchmark resumes."""

    def __init__(self, datasets: Mapping[str, BenchDataset], work: Path, overrides: Sequence[str] = ()):
        """Create a benchmark.

        Args:
            datasets: datasets by name.
            work: directory for shards, runs and results.
            overrides: settings for every training.
        """
        self.datasets, self.work, self.overrides = datasets, work, tuple(overrides)

    def run(self, jobs: Iterable[Job], max_parallel: int) -> None:
        """Train the jobs that have no result, in order, each as soon as its pretraining is finished.

        Raises:
            UserError: if trainings failed, after all jobs that do not depend on them are finished.
        """
        waiting = self._pending(jobs)
        # Otherwise DeepSpeed probes for a GPU before the server forks.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        running: dict[Job, tuple[ForkServerProcess, float]] = {}
        failed: dict[Job, str] = {}
        with show_progress(len(waiting), "trainings", "noise", is_logged=True) as counter:
            while waiting or running:
                ready = [
                    job for job in waiting if job.pretraining is None or self.result_path(job.pretraining).exists()
                ]
                while ready and len(running) < max_parallel:
                    job = ready.pop(0)
                    waiting.remove(job)
                    process = context.Process(target=_train, args=self.task(job))
                    process.start()
                    running[job] = process, time.monotonic()
                time.sleep(0.5)
                for job, (process, started) in list(running.items()):
                    if process.is_alive():
                        continue
                    del running[job]
                    counter.advance()
                    if process.exitcode:
                        failed[job] = f"{job.name} ended with status {process.exitcode}; see {self.log_path(job)}."
                        waiting = [other for other in waiting if other.pretraining != job]
                        print(failed[job], flush=True)
                    else:
                        self.store_report(job)
                        print(f"{job.name}: {time.monotonic() - started:.0f} s, {len(waiting)} left", flush=True)
        if failed:
            raise UserError(
                "\n".join(["Some trainings failed; all that do not depend on them are finished.", *failed.values()])
            )

    def _pending(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs without a result, each preceded by its pretraining if that has no result either."""
        pending: list[Job] = []
        for job in jobs:
            if self.result_path(job).exists():
                continue
            pretraining = job.pretraining
            if pretraining and pretraining not in pending and not self.result_path(pretraining).exists():
                pending.append(pretraining)
            pending.append(job)
        return pending

    def task(self, job: Job) -> tuple[list[str], str, Path, Path, bool]:
        """Create the inputs of a training and return the arguments of `_train`."""
        shards, labels = self.shards(job.cell, job.seed), self.labels(job.cell, job.seed)
        return (
            self.arguments(job, shards, labels),
            str(self.log_path(job)),
            shards,
            labels,
            job.method in ("distav", *ABLATIONS),
        )

    def arguments(self, job: Job, shards: Path, labels: Path) -> list[str]:
        """Return the command line of a training, after copying the checkpoint of its pretraining if it has one."""
        if job.method == PRETRAINING:
            config, overrides = CONFIGS / "avdigits.yaml", _without_later_phases()
        else:
            config, overrides = CONFIGS / f"{job.settings.config}.yaml", job.settings.overrides
        run = self.work / "runs" / job.name
        if job.pretraining and not run.exists():
            # Equal to this run's own checkpoint after its first phase, which uses no labels.
            shutil.copytree(self.work / "runs" / job.pretraining.name / "checkpoints", run / "checkpoints")
        return [
            "--config", str(config), f"data.root={shards}", f"data.label_overrides={labels}",
            f"run.root={self.work / 'runs'}", f"run.name={job.name}", f"run.seed={job.seed}",
            "run.device=cpu", "run.threads_per_rank=1", "monitor.media_clips=0",
            *self.datasets[job.cell.dataset].overrides, *overrides, *self.overrides,
        ]  # fmt: skip

    def shards(self, cell: Cell, seed: int) -> Path:
        """Return the dataset of a cell with true labels; it is rendered if it does not exist."""
        out = self.work / "shards" / file_name(f"{cell.dataset}, pairs {cell.mismatch_rate:g}, seed {seed}")
        if not (out / "manifest.json").exists():
            from distav.tools.make_shards import main as make_shards

            dataset = self.datasets[cell.dataset]
            noise = ("--seed", str(seed), "--correspondence-noise", str(cell.mismatch_rate))
            status = make_shards([*dataset.source, str(out), *dataset.options, *noise])
            if status:
                raise UserError(f"{out}: make_shards.py failed with status {status}.")
        return out

    def labels(self, cell: Cell, seed: int) -> Path:
        """Return the table of a cell's given labels; it is written if it does not exist."""
        path = self.work / "labels" / file_name(f"{cell.name}, seed {seed}.parquet")
        if not path.exists():
            shards = ShardedDataset.open(self.shards(cell, seed))
            labels = load_labels(shards, shards.split("train"))
            noise = LabelNoise.parse(cell.label_noise)
            given = labels.given
            if noise:
                given = flip_labels(labels.given, len(labels.classes), noise, np.random.default_rng([seed, 7]))
            path.parent.mkdir(parents=True, exist_ok=True)
            names = np.array(labels.classes, dtype=object)
            write_table(path, pa.table({"id": np.arange(len(given)), "label": names[given]}))
        return path

    def store_report(self, job: Job) -> None:
        """Store the report of a training and delete its checkpoints, except those of a pretraining."""
        run = self.work / "runs" / job.name
        report = json.loads((run / "report.json").read_text())
        if (run / "detection.json").exists():
            report["detection"] = json.loads((run / "detection.json").read_text())
        path = self.result_path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
        if job.method != PRETRAINING:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)

    def result_path(self, job: Job) -> Path:
        """Return the file for the report of a training."""
        return self.work / "results" / f"{job.name}.json"

    def log_path(self, job: Job) -> Path:
        """Return the file for the output of a training."""
        path = self.work / "logs" / f"{job.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _without_later_phases() -> tuple[str, ...]:
    """Return overrides that remove all phases of the recipe but the first."""
    phases = loading.load(CONFIGS / "avdigits.yaml").phases
    return tuple(f"~phases.{name}" for name in list(phases)[1:])


def _train(arguments: list[str], log: str, shards: Path, labels: Path, corrects_labels: bool) -> None:
    """Run one training in its own process, and compare its label correction with cleanlab's."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from distav.train import main

    status = main(arguments)
    if corrects_labels and not status:
        from tools.bench.noise.detection import compare

        compare(Path(log).parents[1] / "runs" / Path(log).stem, shards, labels, "labels")
    sys.exit(status)
