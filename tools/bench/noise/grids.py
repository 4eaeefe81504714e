"""Grids of the noise benchmark that the command line selects, and their trainings: digits and natural datasets."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distav.config.errors import UserError, did_you_mean, format_list
from tools.bench.noise.datasets import DATASETS, DIGITS, NATURAL, digit_datasets, natural_datasets
from tools.bench.noise.experiments import EXPERIMENTS, Cell, Experiment, Job, natural
from tools.bench.noise.runner import Bench


@dataclass(frozen=True)
class Selection:
    """A part of a grid; an empty field selects all.

    Attributes:
        seeds: seeds of data, noise and training.
        datasets: names of datasets.
        methods: names of methods.
        label_noises: types and rates such as "symmetric:0.4"; "none" for clean labels.
        mismatch_rates: fractions of the training clips whose audio is swapped.
    """

    seeds: Sequence[int]
    datasets: Sequence[str] = ()
    methods: Sequence[str] = ()
    label_noises: Sequence[str] = ()
    mismatch_rates: Sequence[float] = ()

    def jobs(self, cells: Experiment) -> list[Job]:
        """Return the trainings of the selected cells and methods, each once.

        Raises:
            UserError: naming the first dataset or method that has no cell, or if nothing is selected.
        """
        check_names("--datasets", self.datasets, {cell.dataset: None for cell, _ in cells})
        check_names("--methods", self.methods, {method: None for _, methods in cells for method in methods})
        jobs = [
            Job(cell, method, seed)
            for seed in self.seeds
            for cell, methods in cells
            for method in methods
            if self._includes(cell) and method in (self.methods or methods)
        ]
        if not jobs:
            noises = {cell.label_noise or "none": None for cell, _ in cells}
            rates = sorted({cell.mismatch_rate for cell, _ in cells})
            raise UserError(
                "no training has the selected dataset, method, label noise and mismatch rate; "
                f"--label-noise: {format_list(noises)}; --mismatch-rate: {format_list(map(str, rates))}."
            )
        return list(dict.fromkeys(jobs))

    def _includes(self, cell: Cell) -> bool:
        return (
            cell.dataset in (self.datasets or (cell.dataset,))
            and (cell.label_noise or "none") in (self.label_noises or (cell.label_noise or "none",))
            and cell.mismatch_rate in (self.mismatch_rates or (cell.mismatch_rate,))
        )


def run_digits(
    digits: Path, work: Path, experiments: Sequence[str], selection: Selection, max_parallel: int
) -> tuple[Bench, list[Job]]:
    """Run the trainings on digits that have no result.

    Args:
        digits: directory of the digits' files.
        work: directory for shards, runs and results.
        experiments: names of experiments; empty for all.
        selection: the part of the experiments that is run.
        max_parallel: number of parallel trainings.

    Returns:
        The bench and its jobs; after an interrupt, some have no result.

    Raises:
        UserError: for unknown datasets or experiments, missing files, or a training that fails.
    """
    check_names("--experiments", experiments, EXPERIMENTS)
    cells = [cell for experiment in experiments or EXPERIMENTS for cell in EXPERIMENTS[experiment]()]
    return run_jobs(Bench(digit_datasets(digits), work), selection.jobs(cells), max_parallel)


def run_natural(
    sources: Path, work: Path, visual_weights: Path | None, selection: Selection, max_parallel: int
) -> tuple[Bench, list[Job]]:
    """Run the trainings on natural datasets that have no result; see `run_digits`.

    Args:
        sources: directory with clones of the repositories.
        work: directory for clips, shards, runs and results.
        visual_weights: file with ImageNet weights of EfficientNet-Lite0.
        selection: the part of the grid that is run; without datasets, all that need no pretrained weights.
        max_parallel: number of parallel trainings.
    """
    check_names("--datasets", selection.datasets, [name for name in DATASETS if name not in DIGITS])
    names = tuple(selection.datasets) or tuple(NATURAL)
    jobs = selection.jobs(natural(names))
    return run_jobs(Bench(natural_datasets(sources, work, names, visual_weights), work), jobs, max_parallel)


def run_jobs(bench: Bench, jobs: list[Job], max_parallel: int) -> tuple[Bench, list[Job]]:
    """Run the trainings that have no result; returns the bench and its jobs.

    Raises:
        UserError: if a training fails.
    """
    with contextlib.suppress(KeyboardInterrupt):
        bench.run(jobs, max_parallel)
    return bench, jobs


def check_names(option: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Check the values of an option.

    Raises:
        UserError: naming the first value that is not allowed.
    """
    for name in names:
        if name not in allowed:
            raise UserError(f"{option}={name}: allowed: {format_list(allowed)}.{did_you_mean(name, allowed)}")
