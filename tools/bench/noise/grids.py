"""Grids of the noise benchmark that the command line selects, and their trainings: digits and natural datasets."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from distav.config.errors import UserError, did_you_mean, format_list
from tools.bench.noise.datasets import DATASETS, DIGITS, NATURAL, digit_datasets, natural_datasets
from tools.bench.noise.experiments import EXPERIMENTS, NATURAL_METHODS, Experiment, Job, natural
from tools.bench.noise.runner import Bench


def run_digits(
    digits: Path,
    work: Path,
    seeds: Sequence[int],
    datasets: Sequence[str],
    experiments: Sequence[str],
    max_parallel: int,
) -> tuple[Bench, list[Job]]:
    """Run the trainings on digits that have no result.

    Args:
        digits: directory of the digits' files.
        work: directory for shards, runs and results.
        seeds: seeds of data, noise and training.
        datasets: names of datasets; empty for all.
        experiments: names of experiments; empty for all.
        max_parallel: number of parallel trainings.

    Returns:
        The bench and its jobs; after an interrupt, some have no result.

    Raises:
        UserError: for unknown datasets or experiments, missing files, or a training that fails.
    """
    check_names("--experiments", experiments, EXPERIMENTS)
    check_names("--datasets", datasets, DIGITS)
    cells = [
        (cell, methods)
        for experiment in experiments or EXPERIMENTS
        for cell, methods in EXPERIMENTS[experiment]()
        if cell.dataset in (datasets or DIGITS)
    ]
    return run_cells(Bench(digit_datasets(digits), work), cells, seeds, max_parallel)


def run_natural(
    sources: Path,
    work: Path,
    seeds: Sequence[int],
    names: Sequence[str],
    visual_weights: Path | None,
    max_parallel: int,
    methods: Sequence[str] = (),
    label_noises: Sequence[str] = (),
    mismatch_rates: Sequence[float] = (),
) -> tuple[Bench, list[Job]]:
    """Run the trainings on natural datasets that have no result; see `run_digits`.

    Args:
        sources: directory with clones of the repositories.
        work: directory for clips, shards, runs and results.
        seeds: seeds of noise and training.
        names: names of datasets; empty for all that need no pretrained weights.
        visual_weights: file with ImageNet weights of EfficientNet-Lite0.
        max_parallel: number of parallel trainings.
        methods, label_noises, mismatch_rates: parts of the grid; empty for all.
    """
    allowed = [name for name in DATASETS if name not in DIGITS]
    check_names("--datasets", names, allowed)
    check_names("--methods", methods, NATURAL_METHODS)
    names = names or tuple(NATURAL)
    bench = Bench(natural_datasets(sources, work, names, visual_weights), work)
    cells = [
        (cell, tuple(methods) or cell_methods)
        for cell, cell_methods in natural(names)
        if (not label_noises or cell.label_noise in label_noises)
        and (not mismatch_rates or cell.mismatch_rate in mismatch_rates)
    ]
    return run_cells(bench, cells, seeds, max_parallel)


def run_cells(bench: Bench, cells: Experiment, seeds: Sequence[int], max_parallel: int) -> tuple[Bench, list[Job]]:
    """Run the trainings of cells that have no result; returns the bench and its jobs.

    Raises:
        UserError: if a training fails.
    """
    jobs = [Job(cell, method, seed) for seed in seeds for cell, methods in cells for method in methods]
    jobs = list(dict.fromkeys(jobs))
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
