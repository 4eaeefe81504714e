"""Active complementary loss, compared with the published formula, over both sources of negatives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.losses.active_complementary import active_complementary_loss, rescale_matching_probability
from distav.losses.info_nce import InBatchNegatives, SampledNegatives, cross_entropy
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling, sample_negative_ids

TAU, LAMBDA = 0.05, 5.0


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def published(scores: np.ndarray, own: np.ndarray, correspondence: np.ndarray) -> np.ndarray:
    """One direction of CRCL's loss, computed pair by pair in float64."""
    losses = np.zeros(len(scores))
    for i, row in enumerate(scores.astype(np.float64)):
        p = np.exp(row - row.max())
        p /= p.sum()
        negatives = sum(math.tan(p[j]) for j in range(len(p)) if j != own[i])
        total = sum(math.tan(probability) for probability in p)
        active = -correspondence[i] * math.log(p[own[i]])
        losses[i] = active + LAMBDA * negatives / total ** (1 - correspondence[i])
    return losses


def in_batch_negatives(rows: int = 16, dim: int = 8) -> tuple[InBatchNegatives, Tensor, Tensor]:
    visual, audio = unit(rows, dim, 1).requires_grad_(), unit(rows, dim, 2).requires_grad_()
    global_batch = GlobalBatch.gather(torch.arange(rows), torch.ones(rows, dtype=torch.bool), visual, audio)
    return InBatchNegatives(global_batch, visual, audio, TAU), visual, audio


def test_loss_over_the_batch_equals_the_published_one():
    negatives, visual, audio = in_batch_negatives()
    correspondence = torch.linspace(0, 1, 16)
    losses = negatives.losses(active_complementary_loss(correspondence, LAMBDA))
    scores, own = (visual.detach() @ audio.detach().T / TAU).numpy(), np.arange(16)
    expected = published(scores, own, correspondence.numpy()) + published(scores.T, own, correspondence.numpy())
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=2e-5)
    assert negatives.num_candidates().tolist() == [16] * 16


def test_gradient_over_the_batch_equals_finite_differences():
    visual, audio = unit(5, 4, 1).double().requires_grad_(), unit(5, 4, 2).double().requires_grad_()
    correspondence = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)

    def loss(v: Tensor, a: Tensor) -> Tensor:
        score_loss, own = active_complementary_loss(correspondence, LAMBDA), torch.arange(5)
        return score_loss(v @ a.T / 0.5, own) + score_loss(a @ v.T / 0.5, own)

    assert torch.autograd.gradcheck(loss, (visual, audio))


def test_loss_over_sampled_rows_and_its_gradient_equal_the_published_ones():
    bank, ids = Bank(200, 8, 0.5, torch.device("cpu"), seed=3), torch.tensor([4, 90, 17])
    correspondence, own = torch.tensor([0.0, 0.4, 1.0]), torch.zeros(3, dtype=torch.int64)
    score_loss = active_complementary_loss(correspondence, LAMBDA)
    expected_visual, expected_audio = unit(3, 8, 5).requires_grad_(), unit(3, 8, 6).requires_grad_()
    row_ids = torch.cat([ids[:, None], sample_negative_ids(ids, 31, 200, seed=1, step=5)], dim=1)
    expected = torch.zeros(3)
    for queries, name in ((expected_visual, "audio"), (expected_audio, "visual")):
        scores = torch.einsum("bd,bmd->bm", queries, bank.columns[name][row_ids]) / TAU
        losses = score_loss(scores, own)
        by_formula = published(scores.detach().numpy(), own.numpy(), correspondence.numpy())
        np.testing.assert_allclose(losses.detach().numpy(), by_formula, rtol=2e-5)
        expected = expected + losses
    expected.sum().backward()

    visual, audio = unit(3, 8, 5).requires_grad_(), unit(3, 8, 6).requires_grad_()
    global_batch = GlobalBatch.gather(ids, torch.ones(3, dtype=torch.bool), visual, audio)
    losses = SampledNegatives(bank, global_batch, visual, audio, TAU, NegativeSampling(31, 1, 5)).losses(score_loss)
    bank.update(global_batch, torch.ones(3))  # The backward pass runs after the bank has been updated.
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(visual.grad, expected_visual.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(audio.grad, expected_audio.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("correspondence", [0.0, 0.5, 1.0])
def test_terms_for_uniform_scores(correspondence: float):
    scores, own, y = torch.zeros(1, 128), torch.zeros(1, dtype=torch.int64), torch.tensor([correspondence])
    active = active_complementary_loss(y, 0.0)(scores, own).item()
    assert 2 * active == pytest.approx(correspondence * 9.704, abs=1e-3)
    complementary = active_complementary_loss(y, 1.0)(scores, own).item() - active
    assert 2 * complementary == pytest.approx(2 * (1 - 1 / 128), rel=1e-3)


def test_mismatched_pair_costs_at_most_the_weight():
    scores, own = torch.tensor([[0.0, 40.0, 0.0], [40.0, 0.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    mismatched = active_complementary_loss(torch.zeros(2), 1.0)(scores, own)
    torch.testing.assert_close(mismatched, torch.tensor([1.0, 0.0]))
    matched = active_complementary_loss(torch.ones(2), 1.0)(scores, own)
    torch.testing.assert_close(matched, torch.tensor([40 + math.tan(1.0), 0.0]))


def test_masked_rows_and_repeated_samples_are_no_candidates():
    valid = torch.ones(6, dtype=torch.bool)
    valid[4] = False
    visual, audio = unit(6, 8, 1), unit(6, 8, 2)
    ids = torch.tensor([0, 1, 2, 0, 9, 5])
    negatives = InBatchNegatives(GlobalBatch.gather(ids, valid, visual, audio), visual, audio, TAU)
    assert negatives.num_candidates().tolist() == [4, 5, 5, 4, 6, 5]
    allowed = torch.tensor([0, 1, 2, 5])
    expected = (visual[0] @ audio[allowed].T / TAU).softmax(0)[0] + (audio[0] @ visual[allowed].T / TAU).softmax(0)[0]
    assert negatives.matching_probability()[0] == pytest.approx(expected.item() / 2, rel=1e-5)
    assert torch.isfinite(negatives.losses(cross_entropy)).all()


def test_rescaled_matching_probability_does_not_depend_on_the_number_of_candidates():
    probability = torch.tensor([0.0, 0.2, 0.7, 1.0])
    torch.testing.assert_close(rescale_matching_probability(probability, 128, 128), probability)
    among_ten = rescale_matching_probability(probability, torch.full((4,), 1000), 10)
    torch.testing.assert_close(rescale_matching_probability(among_ten, 10, 1000), probability)
    uniform = rescale_matching_probability(torch.tensor([1 / 50_000]), 50_000, 128)
    assert uniform.item() == pytest.approx(1 / 128, rel=1e-4)
