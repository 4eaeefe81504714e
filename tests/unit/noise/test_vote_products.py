"""Probabilities of the given labels under products of votes, against the model's definition and automatic gradients."""

import pytest
import torch
from torch import Tensor

from distav.noise.composite_likelihood import CompositeLikelihood
from distav.noise.model_parameters import LabelNoise, Parameters, Votes
from distav.noise.vote_model import class_probs, label_likelihood
from distav.noise.vote_products import exponents, product_likelihoods

NUM_SAMPLES, NUM_CLASSES, NUM_RATES = 7, 4, 3


def random_votes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_that_of_finite_differences(symmetric: bool, generator: torch.Generator):
    powers = torch.rand(NUM_RATES, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    tables = random_votes(generator, 3, NUM_SAMPLES, NUM_CLASSES).transpose(1, 2).contiguous()
    labels = torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)
    probs = torch.rand(NUM_RATES, NUM_CLASSES, NUM_SAMPLES, generator=generator, dtype=torch.float64)
    label_probs = None if symmetric else probs
    assert torch.autograd.gradcheck(lambda values: product_likelihoods(values, tables, labels, label_probs), powers)


@pytest.mark.parametrize("num_joint", [0, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_likelihoods_are_those_of_the_model(symmetric: bool, num_joint: int, generator: torch.Generator):
    def tables(count: int) -> list[Tensor]:
        return list(random_votes(generator, count, NUM_SAMPLES, NUM_CLASSES))

    present = torch.ones(NUM_SAMPLES, dtype=torch.bool)
    votes = Votes(tables(2), tables(1), tables(num_joint), present, present)
    labels = torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)
    likelihood = CompositeLikelihood(votes, labels, NUM_CLASSES, torch.ones(NUM_SAMPLES, dtype=torch.float64))
    frequencies = random_votes(generator, NUM_RATES, NUM_CLASSES).exp()
    matrices = None if symmetric else random_votes(generator, NUM_RATES, 2, NUM_CLASSES, NUM_CLASSES).exp()
    column = torch.full((NUM_RATES, 1), 0.5, dtype=torch.float64)
    parameters = Parameters(
        torch.randn(NUM_RATES, 6 + num_joint + 3, generator=generator, dtype=torch.float64),
        0.3 * column,
        column,
        frequencies,
        LabelNoise(torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64), matrices),
        torch.ones(NUM_RATES, 2, dtype=torch.float64),
    )
    label_probs = parameters.noise.probabilities(labels, likelihood.fold)
    probs = class_probs(parameters, likelihood.votes)
    expected = label_likelihood(parameters, probs, labels, label_probs, present)
    visual, audio, fused, *of_owner = likelihood._likelihoods(parameters, label_probs).unbind(1)
    torch.testing.assert_close(fused, expected.fused)
    owners = of_owner or (visual, audio)
    torch.testing.assert_close(owners[0], expected.visual)
    torch.testing.assert_close(owners[1], expected.audio)
    for table, actual in ((probs.visual, visual), (probs.audio, audio)):
        torch.testing.assert_close(actual, parameters.noise.likelihood(table, labels, label_probs))
    assert exponents(parameters, votes).shape == (NUM_RATES, 5 if num_joint else 3, 3 + num_joint)
