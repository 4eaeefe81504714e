"""Votes take few tables [n, C] at a time, each measured in a process of its own by the peak of its memory."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distav.noise import calibration
from distav.noise.calibration import VoteCalibrator
from distav.noise.class_agreement import class_agreement, pair_posterior
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.label_correction import CorrectionPrior, FeatureSpace, VoteSearchSpace, correct_labels
from distav.noise.noise_rate import estimate_transition_matrix, uniform_transition_matrix

CLASSES = 700
BESIDE = 16 * 2**20 + 8 * CLASSES**2 * 8
"""Bytes of the temporary results of one tile, and of some [C, C] float64 matrices."""


def resident(name: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def growth(work: Callable[[], object]) -> int:
    """By how many bytes the peak of this process grows while something is done."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def shares(num: int, seed: int) -> Tensor:
    """Votes of little certainty: [num, C], rows add up to 1."""
    found = torch.rand(num, CLASSES, generator=torch.Generator().manual_seed(seed))
    found.pow_(4)
    return found.div_(found.sum(1, keepdim=True))


def functions(num: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """The functions that take whole tables, by name, with the number of tables that each returns."""
    labels, every = torch.arange(num) % CLASSES, torch.ones(num, dtype=torch.bool)
    pictures, votes, even = shares(num, 0), shares(num, 1), uniform_transition_matrix(1.0, CLASSES).double()
    judges = VoteCalibrator(labels, CLASSES, every)
    calibration, agreed = judges.calibrate(votes), class_agreement(pictures, votes, every)
    features = torch.randn(num, 4, generator=torch.Generator().manual_seed(2))
    near = NeighborGraph(features, 10, torch.arange(num), every)
    election = near.vote(labels, CLASSES, 10, 0.2)
    return {
        "agreement": (0, lambda: class_agreement(pictures, votes, every)),
        "pair_evidence": (1, lambda: pair_posterior(pictures, agreed, agreed.rate_log_likelihood, every)),
        "calibrate": (0, lambda: judges.calibrate(votes)),
        "sharpened": (1, lambda: calibration.inverse_temperature(votes)),
        "pool": (1, lambda: judges.fit_ensemble([pictures, votes], even)),
        "noise_matrix": (1, lambda: estimate_transition_matrix(votes, labels, 0.4, even, 2)),
        "election": (1, lambda: near.vote(labels, CLASSES, 10, 0.2)),
        "second_vote": (1, lambda: election.second_round(labels, 10)),
    }


def of_functions(num: int) -> dict[str, tuple[int, int]]:
    """Tables returned, and by how many bytes the peak grows, of each function."""
    torch.set_num_threads(1)
    for _, work in functions(50).values():
        work()  # What the libraries allocate once.
    return {name: (returned, growth(work)) for name, (returned, work) in functions(num).items()}


@pytest.mark.parametrize("num", [12_500, pytest.param(250_000, marks=pytest.mark.long)])
def test_functions_take_little_more_than_the_table_that_they_return(num: int):
    """Peak above the arguments <= 1.3 x the tables returned + what is beside."""
    table = num * CLASSES * 4
    grown = apart(of_functions, num)
    too_much = {
        name: f"{grown / table:.2f} tables"
        for name, (returned, grown) in grown.items()
        if grown > 1.3 * returned * table + BESIDE
    }
    assert not too_much


def of_features(num: int) -> int:
    every, features = torch.ones(num, dtype=torch.bool), torch.randn(num, 512)
    pca_whiten(features[:1000], every[:1000], 48, 0.5)
    return growth(lambda: pca_whiten(features, every, 48, 0.5))


def test_features_are_standardised_without_copies_of_them():
    """Peak above the features <= the result + what is beside, for which float64 copies are too large by far."""
    assert apart(of_features, 100_000) <= 1.1 * 100_000 * 48 * 4 + BESIDE


def of_correction(num: int, again: bool) -> int:
    torch.set_num_threads(1)
    voting, grown = VoteSearchSpace((8,), (0, 8), (0.2,), (0.0,), 16), 0
    calibration.MAX_CALIBRATION_SAMPLES = 1000  # Time goes with the judges; memory hardly does.
    for size in (1000, num):
        generator = torch.Generator().manual_seed(1)
        true = torch.arange(size) % CLASSES
        visual, audio = (
            4 * torch.randn(CLASSES, 16, generator=generator)[true] + torch.randn(size, 16, generator=generator)
            for _ in range(2)
        )
        given = torch.where(torch.rand(size, generator=generator) < 0.3, (true + 1) % CLASSES, true)
        problem = given, CLASSES, torch.arange(size), torch.ones(size, dtype=torch.bool)
        more = ()
        if again:
            uneven = torch.zeros(91, dtype=torch.float64)
            more = CorrectionPrior(shares(size, 1), uneven, uneven), (shares(size, 2), shares(size, 3))
        grown = growth(partial(correct_labels, [FeatureSpace("rows", visual, audio)], *problem, voting, *more))
    return grown


@pytest.mark.parametrize(("num", "again"), [(12_500, False), pytest.param(20_000, True, marks=pytest.mark.long)])
def test_a_correction_holds_the_tables_of_its_ensemble_and_two_more(num: int, again: bool):
    """Peak above the arguments <= M + 2 tables + what is beside.

    M are the members of the ensemble that are no arguments: 4, and 2 of teachers. With them the shares of the sounds
    are held, and what the members are pooled to; of the 4 tables returned all but the first are made when members are
    gone. Beside are a tile, [C, C] matrices, 2 of them for each of 2 ways to vote, and k neighbours of each sample,
    with 44 bytes that the search takes for each.
    """
    members, table = 6 if again else 4, num * CLASSES * 4
    allowed = (members + 2) * table + BESIDE + 2 * 2 * CLASSES**2 * 8 + num * 8 * 44
    grown = apart(of_correction, num, again)
    assert grown <= allowed, f"{grown / table:.2f} tables, allowed {allowed / table:.2f}"
