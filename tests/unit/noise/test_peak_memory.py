"""Peak memory of votes in tables [n, C], each measured in its own process."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.noise import label_model, model_fit, rate_fit, vote_score
from distav.noise.correction import CorrectionPrior
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.label_correction import correct_labels
from distav.noise.noise_rate import candidate_rates, transition_matrix
from distav.noise.vote_score import VoteScorer
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace
from tests.helpers.peak_memory import peak_growth

NUM_CLASSES = 700
OVERHEAD = 16 * 2**20 + 8 * NUM_CLASSES**2 * 8
"""Bytes of the temporary results of a tile and of a few [C, C] float64 matrices."""
CORRECTION_CLASSES = 350


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of a function in a process that returns freed blocks to the system at once."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    with mock.patch.dict(os.environ, thresholds), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def draw_probs(num_samples: int, seed: int, num_classes: int = NUM_CLASSES) -> Tensor:
    """Return diffuse votes: [num_samples, num_classes], rows sum to 1."""
    probs = torch.rand(num_samples, num_classes, generator=torch.Generator().manual_seed(seed))
    probs.pow_(4)
    return probs.div_(probs.sum(1, keepdim=True))


def functions(num_samples: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return the functions of complete tables by name, each with the number of tables that it returns."""
    labels, valid = torch.arange(num_samples) % NUM_CLASSES, torch.ones(num_samples, dtype=torch.bool)
    votes = draw_probs(num_samples, 0)
    scorer = VoteScorer(labels, NUM_CLASSES, valid)
    features = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(2))
    graph = NeighborGraph(features, 10, torch.arange(num_samples) // 3, valid)
    vote = graph.vote(labels, NUM_CLASSES, 10, 0.2)
    return {
        "VoteScorer.score": (0, lambda: scorer.score(votes)),
        "transition_matrix": (0, lambda: transition_matrix(votes, labels)),
        "vote": (1, vote.table),
        "second_round": (1, lambda: graph.vote(labels, NUM_CLASSES, 10, 0.2).table(10)),
    }


def measure_functions(num_samples: int) -> dict[str, tuple[int, int]]:
    """Return the number of tables that each function returns, and its peak growth in bytes."""
    torch.set_num_threads(1)
    vote_score.MAX_SCORED_SAMPLES = 2000  # Limits the run time; memory does not depend on it.
    for _, work in functions(50).values():
        work()  # One-time allocations of the libraries.
    return {name: (num_tables, peak_growth(work)) for name, (num_tables, work) in functions(num_samples).items()}


@pytest.mark.parametrize("num_samples", [12_500, pytest.param(250_000, marks=pytest.mark.long)])
def test_functions_take_little_more_memory_than_the_table_that_they_return(num_samples: int):
    """Peak above the arguments <= 1.3 x returned tables + overhead."""
    table = num_samples * NUM_CLASSES * 4
    measured = in_own_process(measure_functions, num_samples)
    assert len(measured) == 4
    exceeding = {
        name: f"{growth / table:.2f} tables"
        for name, (num_tables, growth) in measured.items()
        if growth > 1.3 * num_tables * table + OVERHEAD
    }
    assert not exceeding


def measure_whitening(num_samples: int) -> int:
    valid, features = torch.ones(num_samples, dtype=torch.bool), torch.randn(num_samples, 512)
    pca_whiten(features[:1000], valid[:1000], 48, 0.5)
    return peak_growth(lambda: pca_whiten(features, valid, 48, 0.5))


def test_features_are_whitened_without_copies():
    """Peak above the features <= result + overhead; a float64 copy would be far larger."""
    assert in_own_process(measure_whitening, 100_000) <= 1.1 * 100_000 * 48 * 4 + OVERHEAD


def measure_neighbors(num_samples: int, k: int, num_probes: int | None) -> int:
    torch.set_num_threads(1)
    growth = 0
    for size in (1000, num_samples):
        features = torch.randn(size, 8, generator=torch.Generator().manual_seed(0))
        arguments = features, k, torch.arange(size), torch.ones(size, dtype=torch.bool), num_probes
        growth = peak_growth(lambda arguments=arguments: NeighborGraph(*arguments))
    return growth


@pytest.mark.parametrize("num_probes", [None, 12])
def test_neighbors_take_8_bytes_each(num_probes: int | None):
    """Peak above the features <= 8 bytes per neighbor + the buffers of a block of queries."""
    growth = in_own_process(measure_neighbors, 20_000, 300, num_probes)
    assert growth <= 1.1 * 20_000 * 300 * 8 + 64 * 2**20, f"{growth / (20_000 * 300):.1f} bytes per neighbor"


def measure_correction(num_samples: int, with_prior: bool) -> int:
    torch.set_num_threads(1)
    growth = 0
    search_space = VoteSearchSpace((8,), (0, 8), (0.2,), (0.0,), 16)
    # A short fit to few samples, whose memory does not depend on the number of samples.
    vote_score.MAX_SCORED_SAMPLES = 1000
    model_fit.MAX_FIT_SAMPLES = model_fit.MIN_FIT_SAMPLES = 100
    model_fit.STEPS = 2
    rate_fit.GRID, rate_fit.COARSE_GRID, label_model.MISMATCH_GRID = (0.2, 0.4), (0.2, 0.4), (0.05, 0.3)
    for size, num_classes in ((300, 20), (num_samples, CORRECTION_CLASSES)):
        generator = torch.Generator().manual_seed(1)
        true = torch.arange(size) % num_classes
        visual, audio = (
            4 * torch.randn(num_classes, 16, generator=generator)[true] + torch.randn(size, 16, generator=generator)
            for _ in range(2)
        )
        given = torch.where(torch.rand(size, generator=generator) < 0.3, (true + 1) % num_classes, true)
        has_modality = dict.fromkeys(MODALITIES, torch.ones(size, dtype=torch.bool))
        dataset = given, num_classes, torch.arange(size), has_modality
        optional = ()
        if with_prior:
            rates = torch.zeros_like(candidate_rates(num_classes))
            prior = CorrectionPrior(draw_probs(size, 1, num_classes), rates, rates, 0.97)
            optional = prior, (draw_probs(size, 2, num_classes), draw_probs(size, 3, num_classes))
        spaces = [FeatureSpace("rows", visual, audio)]
        growth = peak_growth(partial(correct_labels, spaces, *dataset, search_space, *optional))
    return growth


@pytest.mark.parametrize(
    ("num_samples", "with_prior"), [(12_500, False), pytest.param(50_000, True, marks=pytest.mark.long)]
)
def test_correction_holds_three_tables_of_votes_and_the_six_of_its_result(num_samples: int, with_prior: bool):
    """Peak above the arguments <= 2 tables of float32 and 7 of float16 + 0.7 tables of float32 + overhead.

    Votes of a prior and of teachers are not copied. The overhead has a tile, the fit, and 8 neighbors per sample with
    16 bytes each for the search.
    """
    table = num_samples * CORRECTION_CLASSES * 4
    allowed = (2 + 7 / 2 + 0.7) * table + 8 * CORRECTION_CLASSES**2 * 8 + num_samples * 8 * 16
    growth = in_own_process(measure_correction, num_samples, with_prior)
    assert growth <= allowed, f"{growth / table:.2f} tables, allowed {allowed / table:.2f}"
