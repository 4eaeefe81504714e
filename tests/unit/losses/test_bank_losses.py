"""Losses against the memory bank: exact over all rows, and with sampled rows."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.losses.info_nce import SampledNegatives, ScoreLoss, cross_entropy, noise_contrastive
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.bank import Bank
from distav.memory.negative_sampling import NegativeSampling, Partition, sample_negative_ids
from tests.helpers.bank import filled_bank, global_batch_of, unit

CPU = torch.device("cpu")


def exact_losses(bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return instance_losses(bank, global_batch_of(ids, visual, audio), visual, audio, *arguments, **options).losses


def sampled_losses(
    bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, sampling: NegativeSampling, score_loss: ScoreLoss
) -> Tensor:
    global_batch = global_batch_of(ids, visual, audio)
    return SampledNegatives(bank, global_batch, visual, audio, 0.07, sampling).losses(score_loss)


def dense_losses(
    bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, tau: float, softness: Tensor, soft: SoftTargets
) -> Tensor:
    """The published formulas, term by term, in float64."""
    rows = {name: bank.columns[name].double() for name in ("visual", "audio")}
    queries = {"visual": visual.double(), "audio": audio.double()}
    pair_similarity = (rows["visual"] * rows["audio"]).sum(1)
    total = torch.zeros(len(ids), dtype=torch.float64)
    for own, other in (("visual", "audio"), ("audio", "visual")):
        log_p = (queries[own] @ rows[other].T / tau).log_softmax(1)
        with torch.no_grad():
            scores = {
                "none": torch.zeros(len(ids), bank.num_samples, dtype=torch.float64),
                "bootstrapping": queries[own] @ rows[other].T / soft.temperature,
                "swapped": queries[other] @ rows[own].T / soft.temperature,
                "neighbor": rows[own][ids] @ rows[own].T / soft.temperature,
                "cycle": pair_similarity[ids][:, None] / soft.cycle_temperature
                + rows[other][ids] @ rows[other].T / soft.temperature
                + pair_similarity / soft.cycle_temperature,
            }[soft.kind]
            if soft.excludes_self:
                scores[torch.arange(len(ids)), ids] = -math.inf
            targets = scores.softmax(1) * softness.double()[:, None]
            targets[torch.arange(len(ids)), ids] += 1 - softness.double()
        total = total - (targets * log_p).sum(1)
    return total


@pytest.mark.parametrize("kind", ["none", "bootstrapping", "swapped", "neighbor", "cycle"])
@pytest.mark.parametrize("excludes_self", [False, True])
def test_instance_loss_and_gradient_equal_the_dense_formula(kind: str, excludes_self: bool):
    bank = filled_bank(40, 16)
    ids = torch.tensor([7, 30, 12, 12, 39])
    softness = torch.tensor([0.0, 0.2, 0.5, 0.5, 1.0]) * (kind != "none")
    soft = SoftTargets(kind, 0.2, 0.3, excludes_self)
    results = []
    for loss in (exact_losses, dense_losses):
        inputs = [
            torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in (8, 9)
        ]
        visual, audio = F.normalize(inputs[0], dim=1), F.normalize(inputs[1], dim=1)
        losses = loss(bank, ids, visual, audio, 0.07, softness, soft)
        (losses * torch.arange(1.0, 6.0)).sum().backward()
        results.append([losses.detach().double(), *(leaf.grad.double() for leaf in inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_exact_loss_of_a_random_bank_is_log_n_plus_0_8_per_direction():
    num_samples, dim = 20000, 128
    bank = filled_bank(num_samples, dim)
    ids = torch.arange(256)
    losses = exact_losses(bank, ids, unit(256, dim, seed=5), unit(256, dim, seed=6), 0.07)
    assert abs(losses.mean().item() / 2 - (math.log(num_samples) + 1 / (2 * dim * 0.07**2))) < 0.12


def test_exact_loss_of_the_initial_bank_is_log_n_plus_0_8_per_direction():
    bank, ids = Bank(20_000, 128, 0.5, CPU, seed=2), torch.arange(256)
    losses = exact_losses(bank, ids, unit(256, 128, seed=8), unit(256, 128, seed=9), 0.07)
    assert losses.mean().item() / 2 == pytest.approx(math.log(20_000) + 0.80, abs=0.15)


def test_weighted_mean():
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])
    assert weighted_mean(losses, weights).item() == pytest.approx(13 / 4)
    assert weighted_mean(losses, torch.zeros(3)).item() == 0


def test_the_temperature_receives_its_gradient():
    bank, ids = filled_bank(30, 8), torch.tensor([4, 9, 9])
    visual, audio = unit(3, 8, seed=5), unit(3, 8, seed=6)
    softness, soft = torch.tensor([0.0, 0.3, 1.0]), SoftTargets("neighbor", 0.1, 0.1)
    gradients = []
    for loss in (exact_losses, dense_losses):
        tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        (loss(bank, ids, visual, audio, tau, softness, soft) * torch.arange(1.0, 4.0)).sum().backward()
        gradients.append(tau.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_uninitialized_rows_can_be_masked():
    bank, ids = filled_bank(30, 8), torch.tensor([3, 25])
    bank.columns["visits"][20:] = 0
    visual, audio = unit(2, 8, seed=5).requires_grad_(), unit(2, 8, seed=6).requires_grad_()
    losses = exact_losses(bank, ids, visual, audio, 0.1, mask_uninitialized=True)
    expected = sum(
        (query[0] @ rows[:20].T / 0.1).logsumexp(0) - query[0] @ rows[3] / 0.1
        for query, rows in ((visual, bank.columns["audio"]), (audio, bank.columns["visual"]))
    )
    torch.testing.assert_close(losses, torch.stack([expected, torch.zeros(())]))
    losses.sum().backward()
    assert (visual.grad[1] == 0).all() and (visual.grad[0] != 0).any()


def test_sampled_rows_give_the_softmax_over_the_samples():
    bank, ids = filled_bank(500, 16), torch.tensor([7, 0, 499])
    sampled = sample_negative_ids(ids, 64, 500, seed=1, step=5)
    assert not (sampled == ids[:, None]).any() and sampled.min() >= 0 and sampled.max() < 500
    assert not torch.equal(sampled, sample_negative_ids(ids, 64, 500, seed=1, step=6))
    results = []
    for dense in (False, True):
        visual, audio = unit(3, 16, seed=5).requires_grad_(), unit(3, 16, seed=6).requires_grad_()
        if dense:
            losses = torch.zeros(3)
            for query, rows in ((visual, bank.columns["audio"]), (audio, bank.columns["visual"])):
                candidates = rows[torch.cat([ids[:, None], sampled], dim=1)]
                losses = losses - (torch.einsum("bd,bmd->bm", query, candidates) / 0.07).log_softmax(1)[:, 0]
        else:
            losses = sampled_losses(bank, ids, visual, audio, NegativeSampling(64, 1, 5), cross_entropy)
        losses.sum().backward()
        results.append((losses, visual.grad, audio.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_noise_contrastive_estimation_starts_at_avids_value_and_has_its_gradient():
    """Random unit rows, D = 128, temperature 0.07, M = 1024: Z = 2.215, and 7.71 + 1.00 for each direction."""
    bank, ids = Bank(20_000, 128, 0.5, CPU, seed=2), torch.arange(64)
    visual, audio = unit(64, 128, seed=8).requires_grad_(), unit(64, 128, seed=9).requires_grad_()
    partition = Partition()
    sampling, score_loss = NegativeSampling(1024, 1, 5), noise_contrastive(partition)
    losses = sampled_losses(bank, ids, visual, audio, sampling, score_loss)
    assert partition.value == pytest.approx(2.215, abs=0.02)
    assert losses.mean().item() / 2 == pytest.approx(8.71, abs=0.2)
    losses.sum().backward()

    sampled = sample_negative_ids(ids, 1024, 20_000, seed=1, step=5)
    expected = torch.zeros(64)
    copies = [leaf.detach().clone().requires_grad_() for leaf in (visual, audio)]
    for query, rows in zip(copies, (bank.columns["audio"], bank.columns["visual"]), strict=True):
        scores = (torch.einsum("bd,bmd->bm", query, rows[torch.cat([ids[:, None], sampled], dim=1)]) / 0.07).exp()
        noise = 1024 * partition.value
        expected = expected - (scores[:, 0] / (scores[:, 0] + noise)).log()
        expected = expected - (noise / (scores[:, 1:] + noise)).log().sum(1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    expected.sum().backward()
    for actual, copy in zip((visual, audio), copies, strict=True):
        torch.testing.assert_close(actual.grad, copy.grad, rtol=1e-3, atol=1e-5)
    first_value = partition.value
    sampled_losses(bank, ids, audio, visual, sampling, score_loss)
    assert partition.value == first_value
