"""How well a model and its labels come out of wrong labels and wrong pairs, beside simple baselines.

Digits seen and spoken, easy and degraded, at a grid of noise rates. Every method has the same towers, augmentation and
epochs on labels, and the same settings in every cell; the last epoch counts. Phase 1 looks at no label, so runs that
differ in their labels alone start from one phase 1.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, format_list
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.files import write_atomically, write_table
from distav.data.preparation.noise_injection import LabelNoise, flip_labels
from tools.bench.noise.experiments import ABLATIONS, PHASE_1, SETS, Cell, Job, ablations, file_name, grid, pairs

CONFIGS = Path(__file__).parents[3] / "configs"
PARTS = {"grid": grid, "ablations": ablations, "pairs": pairs}
PRELOADED = (
    "distav.train",
    "distav.training.run",
    "distav.training.phases.registry",
    "distav.training.report",
    "deepspeed",
)


class Bench:
    """Runs the grid, several trainings at a time, and goes on where it was left."""

    def __init__(self, digits: Path, work: Path, overrides: Sequence[str] = ()):
        """Take the folder of the digits' files and the folder to work in."""
        self.digits, self.work, self.overrides = digits, work, tuple(overrides)
        for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "fsdd-recordings.tar.gz"):
            if not (digits / name).is_file():
                raise UserError(f"--digits={digits}: has no {name}; get MNIST's test files and FSDD's recordings.")

    def run(self, jobs: Iterable[Job], max_parallel: int) -> None:
        """Train what has no result yet; earlier jobs first, as soon as what they start from is there.

        Raises:
            UserError: where trainings have failed, after all those that need none of them are done.
        """
        waiting = [job for job in jobs if not self.result_path(job).exists()]
        phase_1 = dict.fromkeys(job.phase_1 for job in waiting if job.phase_1)
        missing = [job for job in phase_1 if job and not self.result_path(job).exists()]
        waiting = _before_their_users(waiting, missing)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Or DeepSpeed looks for a GPU before the server forks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        running: dict[Job, tuple[ForkServerProcess, float]] = {}
        failed: dict[Job, str] = {}
        while waiting or running:
            ready = [job for job in waiting if job.phase_1 is None or self.result_path(job.phase_1).exists()]
            while ready and len(running) < max_parallel:
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
                    failed[job] = f"{job.name} ended with status {process.exitcode}; see {self.log_path(job)}."
                    waiting = [each for each in waiting if each.phase_1 != job]
                    print(failed[job], flush=True)
                else:
                    self.keep(job)
                    print(f"{job.name}: {time.monotonic() - began:.0f} s, {len(waiting)} to go", flush=True)
        if failed:
            raise UserError("\n".join(["What needs none of them is done, but:", *failed.values()]))

    def task(self, job: Job) -> tuple[list[str], str, Path, Path, bool]:
        """Make what the training needs and return its command line, its log, and what to judge its correction by."""
        shards, labels = self.shards(job.cell, job.seed), self.labels(job.cell, job.seed)
        return (
            self.arguments(job, shards, labels),
            str(self.log_path(job)),
            shards,
            labels,
            job.method in ("distav", *ABLATIONS),
        )

    def arguments(self, job: Job, shards: Path, labels: Path) -> list[str]:
        """Return the command line of a training, whose phase 1 is put in place where another has done it."""
        changes: tuple[str, ...] = ()
        if job.method == PHASE_1:
            config = self.work / "phase_1.yaml"
            write_atomically(config, _only_phase_1().encode())
        else:
            config, changes = CONFIGS / f"{job.settings.config}.yaml", job.settings.changes
        folder = self.work / "runs" / job.name
        if job.phase_1 and not folder.exists():
            # Its checkpoint is one of this very run after the first phase: the label has had no part in it so far.
            shutil.copytree(self.work / "runs" / job.phase_1.name / "checkpoints", folder / "checkpoints")
        return [
            "--config", str(config), f"data.root={shards}", f"data.label_overrides={labels}", f"run.root={self.work / 'runs'}",
            f"run.name={job.name}", f"run.seed={job.seed}", "run.device=cpu", "run.threads_per_rank=1",
            "monitor.media_clips=0", *changes, *self.overrides,
        ]  # fmt: skip

    def shards(self, cell: Cell, seed: int) -> Path:
        """Return the set of a cell, with right labels; it is rendered where it is not there yet."""
        out = self.work / "shards" / file_name(f"{cell.set}, pairs {cell.pairs:g}, seed {seed}")
        if not (out / "manifest.json").exists():
            from distav.tools.make_shards import main as make_shards

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
            shards = ShardedDataset.open(self.shards(cell, seed))
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
        if job.method != PHASE_1:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def result_path(self, job: Job) -> Path:
        """Where a training's figures are kept."""
        return self.work / "results" / f"{job.name}.json"

    def log_path(self, job: Job) -> Path:
        """Where a training writes what it says."""
        path = self.work / "logs" / f"{job.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


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
        from tools.bench.noise.detection import compare

        compare(Path(log).parents[1] / "runs" / Path(log).stem, shards, labels, "labels")
    sys.exit(status)


def run(
    digits: Path, work: Path, seeds: Sequence[int], sets: Sequence[str], parts: Sequence[str], max_parallel: int
) -> tuple["Bench", list[Job]]:
    """Run what is missing, of all sets and parts where none are named.

    Returns:
        The bench and its jobs, of which those without a result were not reached.

    Raises:
        UserError: for unknown sets or parts, missing files, or a training that fails.
    """
    for option, asked, known in (("--sets", sets, SETS), ("--experiments", parts, PARTS)):
        unknown = set(asked) - set(known)
        if unknown:
            raise UserError(f"{option}: there is no '{min(unknown)}'; allowed: {format_list(known)}.")
    cells = [cell for part in parts or PARTS for cell in PARTS[part]() if cell[0].set in (sets or SETS)]
    jobs = [Job(cell, method, seed) for seed in seeds for cell, methods in cells for method in methods]
    jobs = list(dict.fromkeys(jobs))
    bench = Bench(digits, work)
    with contextlib.suppress(KeyboardInterrupt):
        bench.run(jobs, max_parallel)
    return bench, jobs
