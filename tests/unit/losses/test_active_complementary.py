"""The active complementary loss and self-refined correspondences, against the published formulas."""

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
from distav.noise.correspondence import SelfRefinement

TAU, LAMBDA = 0.05, 5.0


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def published(scores: np.ndarray, own: np.ndarray, believed: np.ndarray) -> np.ndarray:
    """One direction of the loss, pair by pair in float64, as CRCL states it."""
    losses = np.zeros(len(scores))
    for i, row in enumerate(scores.astype(np.float64)):
        p = np.exp(row - row.max())
        p /= p.sum()
        others = sum(math.tan(p[j]) for j in range(len(p)) if j != own[i])
        everyone = sum(math.tan(each) for each in p)
        losses[i] = -believed[i] * math.log(p[own[i]]) + LAMBDA * others / everyone ** (1 - believed[i])
    return losses


def batch(rows: int = 16, dim: int = 8, valid: Tensor | None = None) -> tuple[InBatchNegatives, Tensor, Tensor]:
    visual, audio = unit(rows, dim, 1).requires_grad_(), unit(rows, dim, 2).requires_grad_()
    valid = torch.ones(rows, dtype=torch.bool) if valid is None else valid
    global_batch = GlobalBatch.gather(torch.arange(rows), valid, visual, audio)
    return InBatchNegatives(global_batch, visual, audio, TAU), visual, audio


def test_the_loss_over_the_batch_is_the_published_one():
    candidates, visual, audio = batch()
    believed = torch.linspace(0, 1, 16)
    found = candidates.losses(active_complementary_loss(believed, LAMBDA))
    scores = (visual.detach() @ audio.detach().T / TAU).numpy()
    own = np.arange(16)
    expected = published(scores, own, believed.numpy()) + published(scores.T, own, believed.numpy())
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-5)
    assert candidates.num_candidates().tolist() == [16] * 16


def test_the_gradient_over_the_batch_is_that_of_finite_differences():
    visual, audio = unit(5, 4, 1).double().requires_grad_(), unit(5, 4, 2).double().requires_grad_()
    believed = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)

    def loss(v: Tensor, a: Tensor) -> Tensor:
        loss_of, own = active_complementary_loss(believed, LAMBDA), torch.arange(5)
        return loss_of(v @ a.T / 0.5, own) + loss_of(a @ v.T / 0.5, own)

    assert torch.autograd.gradcheck(loss, (visual, audio))


def test_the_loss_over_drawn_rows_is_the_published_one_with_its_gradient():
    bank, ids = Bank(200, 8, 0.5, torch.device("cpu"), seed=3), torch.tensor([4, 90, 17])
    believed = torch.tensor([0.0, 0.4, 1.0])
    drawn = sample_negative_ids(ids, 31, 200, seed=1, step=5)
    found, expected, gradients = None, torch.zeros(3), []
    for ours in (True, False):
        visual, audio = unit(3, 8, 5).requires_grad_(), unit(3, 8, 6).requires_grad_()
        if ours:
            global_batch = GlobalBatch.gather(ids, torch.ones(3, dtype=torch.bool), visual, audio)
            candidates = SampledNegatives(bank, global_batch, visual, audio, TAU, NegativeSampling(31, 1, 5))
            found = candidates.losses(active_complementary_loss(believed, LAMBDA))
            bank.update(global_batch, torch.ones(3))  # The backward pass comes after the rows have moved on.
            found.sum().backward()
        else:
            bank.reinitialize()
            own = torch.zeros(3, dtype=torch.int64)
            for queries, name in ((visual, "audio"), (audio, "visual")):
                rows = bank.columns[name][torch.cat([ids[:, None], drawn], dim=1)]
                scores = torch.einsum("bd,bmd->bm", queries, rows) / TAU
                expected = expected + active_complementary_loss(believed, LAMBDA)(scores, own)
                np.testing.assert_allclose(
                    active_complementary_loss(believed, LAMBDA)(scores, own).detach().numpy(),
                    published(scores.detach().numpy(), own.numpy(), believed.numpy()),
                    rtol=2e-5,
                )
            expected.sum().backward()
        gradients.append((visual.grad, audio.grad))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("believed", [0.0, 0.5, 1.0])
def test_uniform_matching_costs_what_it_should(believed: float):
    scores, own, y = torch.zeros(1, 128), torch.zeros(1, dtype=torch.int64), torch.tensor([believed])
    active = active_complementary_loss(y, 0.0)(scores, own).item()
    assert 2 * active == pytest.approx(believed * 9.704, abs=1e-3)
    assert 2 * (active_complementary_loss(y, 1.0)(scores, own).item() - active) == pytest.approx(
        2 * (1 - 1 / 128), rel=1e-3
    )


def test_a_pair_that_is_not_believed_costs_at_most_the_weight_and_pulls_nothing_that_others_do_not():
    scores = torch.tensor([[0.0, 40.0, 0.0], [40.0, 0.0, 0.0]])
    found = active_complementary_loss(torch.zeros(2), 1.0)(scores, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]))
    sure = active_complementary_loss(torch.ones(2), 1.0)(scores, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(sure, torch.tensor([40 + math.tan(1.0), 0.0]))


def test_rows_without_a_sample_and_the_same_sample_again_are_no_candidates():
    valid = torch.ones(6, dtype=torch.bool)
    valid[4] = False
    visual, audio = unit(6, 8, 1), unit(6, 8, 2)
    ids = torch.tensor([0, 1, 2, 0, 9, 5])
    candidates = InBatchNegatives(GlobalBatch.gather(ids, valid, visual, audio), visual, audio, TAU)
    assert candidates.num_candidates().tolist() == [4, 5, 5, 4, 6, 5]
    allowed = torch.tensor([0, 1, 2, 5])
    expected = (visual[0] @ audio[allowed].T / TAU).softmax(0)[0] + (audio[0] @ visual[allowed].T / TAU).softmax(0)[0]
    assert candidates.matching_probability()[0] == pytest.approx(expected.item() / 2, rel=1e-5)
    assert torch.isfinite(candidates.losses(cross_entropy)).all()


def test_a_matching_probability_means_the_same_among_any_number_of_candidates():
    share = torch.tensor([0.0, 0.2, 0.7, 1.0])
    torch.testing.assert_close(rescale_matching_probability(share, 128, 128), share)
    there = rescale_matching_probability(share, torch.full((4,), 1000), 10)
    torch.testing.assert_close(rescale_matching_probability(there, 10, 1000), share)
    assert rescale_matching_probability(torch.tensor([1 / 50_000]), 50_000, 128).item() == pytest.approx(
        1 / 128, rel=1e-4
    )


def visits(rule: SelfRefinement, y: float, matching: float, times: int) -> list[float]:
    stored, found = torch.tensor([y]), []
    for _ in range(times):
        believed, stored = rule.update(stored, torch.tensor([matching]), rule.warmup_epochs, first=False)
        found.append(believed.item())
    return found


def test_a_mismatched_pair_takes_twelve_visits_to_be_given_up():
    expected = [0.804, 0.647, 0.522, 0.421, 0.341, 0.277, 0.226, 0.184, 0.152, 0.125, 0.104, 0.0]
    assert visits(SelfRefinement(), 1.0, 0.02, 12) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("matching", [0.15, 0.5, 0.9])
def test_the_average_ends_at_the_matching_probability(matching: float):
    assert visits(SelfRefinement(), 1.0, matching, 80)[-1] == pytest.approx(matching, abs=1e-6)


def test_only_a_stored_zero_holds_a_pair_down():
    assert visits(SelfRefinement(store_thresholded=True), 0.0, 0.45, 50)[-1] == 0
    assert visits(SelfRefinement(store_thresholded=True), 0.0, 0.51, 50)[-1] == pytest.approx(0.51, abs=1e-3)
    assert visits(SelfRefinement(), 0.0, 0.45, 50)[-1] == pytest.approx(0.45, abs=1e-3)


def published_schedule(matching: np.ndarray, pieces: list[int], warmup: int) -> np.ndarray:
    """What the loss uses of one pair, visit by visit, over all pieces, as CRCL's code has it."""
    y, used, visit = 1.0, [], 0
    for piece, epochs in enumerate(pieces):
        for epoch in range(epochs):
            p = matching[visit]
            visit += 1
            if piece == 0 and epoch < warmup:
                used.append(1.0)
                if epoch == warmup - 1:
                    y = p
            elif epoch < warmup:
                used.append(y)
            else:
                y = 0.8 * y + 0.2 * p
                y = 0.0 if y < 0.1 else y
                used.append(y)
    return np.array(used)


@pytest.mark.parametrize("warmup", [1, 2])
def test_pieces_follow_the_published_schedule(warmup: int):
    rng, pieces = np.random.default_rng(2), [4, 4, 9]
    for high in (0.1, 0.3, 1.0):
        matching = rng.uniform(0, high, sum(pieces))
        rule, stored, found, visit = SelfRefinement(0.8, warmup, 0.1, True), torch.ones(1), [], 0
        for piece, epochs in enumerate(pieces):
            for epoch in range(epochs):
                believed, stored = rule.update(stored, torch.tensor([matching[visit]]).float(), epoch, piece == 0)
                found.append(believed.item())
                visit += 1
        expected = published_schedule(matching, pieces, warmup)
        expected[expected < 0.1] = 0  # The first estimate is stored as it is; it is used from the next piece on.
        np.testing.assert_allclose(found, expected, atol=1e-6)
