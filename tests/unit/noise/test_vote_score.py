"""Scores of held-out votes on the given labels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distav.noise import vote_score
from distav.noise.vote_score import INVERSE_TEMPERATURES, PSEUDO_COUNT, VoteScorer, log_votes
from tests.unit.noise.scenes import NUM_CLASSES, flip_to_next_class, teacher_probs


def scorer_of(labels: Tensor, num_classes: int = NUM_CLASSES) -> VoteScorer:
    return VoteScorer(labels, num_classes, torch.ones(len(labels), dtype=torch.bool))


def skewed_labels(num_samples: int) -> Tensor:
    """Draw labels; the frequency of class c is proportional to 1 / (c + 1)."""
    weights = 1 / torch.arange(1.0, NUM_CLASSES + 1)
    return torch.multinomial(weights, num_samples, replacement=True, generator=torch.Generator().manual_seed(0))


def prior_log_likelihood(labels: Tensor) -> float:
    """Return the log-likelihood of the labels under their class frequencies, in nats per sample."""
    frequencies = torch.bincount(labels, minlength=NUM_CLASSES).double() / len(labels)
    return float(frequencies.log()[labels].mean())


@pytest.mark.parametrize("num_samples", [7, 32, 45])
def test_score_is_the_largest_log_likelihood_of_all_rates_and_inverse_temperatures(num_samples: int):
    rng = np.random.default_rng(0)
    votes = rng.dirichlet(np.full(4, 0.3), num_samples).astype(np.float32)
    labels = np.where(rng.random(num_samples) < 0.6, votes.argmax(1), rng.integers(0, 4, num_samples))
    smoothed = (PSEUDO_COUNT * votes.astype(np.float64) + 0.25) / (PSEUDO_COUNT + 1)
    values = []
    for scale in INVERSE_TEMPERATURES:
        probs = smoothed**scale / (smoothed**scale).sum(1, keepdims=True)
        right = probs[np.arange(num_samples), labels]
        for rate in np.linspace(0, 0.75, 2001):
            values.append(np.log((1 - rate) * right + rate * (1 - right) / 3).mean())
    score = scorer_of(torch.from_numpy(labels), 4).score(torch.from_numpy(votes))
    assert score == pytest.approx(max(values), rel=1e-6)
    assert max(values) > min(values) + 0.1


def test_logarithms_of_votes_are_finite_and_their_exponentials_sum_to_1():
    votes = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    logs = log_votes(votes)
    assert bool(logs.isfinite().all())
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(2))
    assert logs[0, 1] == pytest.approx(np.log(1 / 3 / 21))


def test_votes_without_information_gain_no_likelihood_over_the_class_frequencies():
    labels = skewed_labels(1000)
    informative = teacher_probs(labels, 0.6, 1)
    permutation = torch.randperm(1000, generator=torch.Generator().manual_seed(2))
    scorer, baseline = scorer_of(labels), prior_log_likelihood(labels)
    frequencies = torch.bincount(labels, minlength=NUM_CLASSES) / 1000
    assert scorer.score(frequencies.expand(1000, -1)) == pytest.approx(baseline, abs=2e-3)
    for uninformative in (informative[permutation], torch.full((1000, NUM_CLASSES), 0.1)):
        assert 1000 * (scorer.score(uninformative) - baseline) < 1
    assert 1000 * (scorer.score(informative) - baseline) > 200


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_more_informative_votes_have_the_larger_score(asymmetric: bool):
    true = torch.arange(1000) % NUM_CLASSES
    generator = torch.Generator().manual_seed(5)
    flipped = torch.rand(1000, generator=generator) < 0.4
    random_labels = torch.randint(0, NUM_CLASSES, (1000,), generator=generator)
    given = flip_to_next_class(true, 0.4) if asymmetric else torch.where(flipped, random_labels, true)
    scorer = scorer_of(given)
    scores = [scorer.score(teacher_probs(true, accuracy, 3)) for accuracy in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 0.2


def test_votes_of_samples_that_are_not_usable_have_no_effect():
    labels = skewed_labels(200)
    usable = torch.arange(200) % 4 != 1
    votes = teacher_probs(labels, 0.7, 1)
    scorer = VoteScorer(labels, NUM_CLASSES, usable)
    changed = torch.where(usable[:, None], votes, votes.flip(1))
    assert scorer.score(changed) == scorer.score(votes) == scorer_of(labels[usable]).score(votes[usable])
    assert scorer.num_samples == 150
    assert scorer.score(votes.flip(1)) < scorer.score(votes) - 0.1


def test_large_datasets_are_scored_on_a_subset(monkeypatch: pytest.MonkeyPatch):
    labels = skewed_labels(1000)
    votes = teacher_probs(labels, 0.7, 1)
    monkeypatch.setattr(vote_score, "MAX_SCORED_SAMPLES", 400)
    scorer = scorer_of(labels)
    samples = scorer.samples
    assert scorer.num_samples == len(samples.unique()) == len(samples) and 300 < len(samples) <= 400
    assert bool((torch.bincount(samples // 200, minlength=5) > 40).all())
    assert scorer.score(votes) == scorer_of(labels[samples]).score(votes[samples])
    changed = votes.flip(1)
    changed[samples] = votes[samples]
    assert scorer.score(changed) == scorer.score(votes)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_likely_rate_may_be_the_smallest_or_the_largest(accuracy: float):
    labels = torch.arange(500) % NUM_CLASSES
    votes = torch.nn.functional.one_hot(labels if accuracy else (labels + 1) % NUM_CLASSES, NUM_CLASSES).float()
    score = scorer_of(labels).score(votes)
    right = (PSEUDO_COUNT + 0.1) / (PSEUDO_COUNT + 1) if accuracy else 0.1 / (PSEUDO_COUNT + 1)
    largest = 0.9 if accuracy == 0 else 0.0
    scaled = [
        right**scale / (right**scale + 9 * ((1 - right) / 9) ** scale)
        if accuracy
        else right**scale / (9 * right**scale + (1 - 8.0 * right - right) ** scale)
        for scale in INVERSE_TEMPERATURES
    ]
    expected = max(np.log((1 - largest) * value + largest * (1 - value) / 9) for value in scaled)
    assert score == pytest.approx(expected, abs=1e-6)
