"""Contrastive losses of samples that lack a modality."""

import pytest
import torch
from torch import Tensor

from distav.losses.info_nce import CROSS_MODAL, WITHIN_MODAL, InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling
from tests.helpers.bank import unit

NUM_SAMPLES, DIM = 12, 8
PRESENT = {"visual": torch.arange(NUM_SAMPLES) % 3 != 0, "audio": torch.arange(NUM_SAMPLES) % 3 != 1}
PAIRED = PRESENT["visual"] & PRESENT["audio"]
IDS = torch.arange(0, NUM_SAMPLES, 2)


def bank_with_missing_rows() -> Bank:
    bank = Bank(NUM_SAMPLES, DIM, 0.5, torch.device("cpu"), present=PRESENT)
    bank.columns["visits"][:] = 1
    return bank


def batch_of(visual: Tensor, audio: Tensor, ids: Tensor = IDS) -> GlobalBatch:
    present = {name: mask[ids] for name, mask in PRESENT.items()}
    return GlobalBatch.gather(ids, torch.ones_like(ids, dtype=torch.bool), visual, audio, present)


def test_flags_of_a_batch_survive_the_exchange():
    valid = torch.tensor([True, True, False, True])
    present = {"visual": torch.tensor([True, False, False, True]), "audio": torch.tensor([True, True, False, False])}
    batch = GlobalBatch.gather(torch.arange(4), valid, unit(4, DIM), unit(4, DIM), present)
    assert torch.equal(batch.valid, valid) and batch.paired.tolist() == [True, False, False, False]
    assert all(torch.equal(batch.present[name], mask) for name, mask in present.items())


@pytest.mark.parametrize("directions", [CROSS_MODAL, WITHIN_MODAL])
def test_a_softmax_over_the_bank_leaves_out_rows_of_a_missing_modality(directions: tuple[tuple[str, str], ...]):
    bank, tau = bank_with_missing_rows(), 0.5
    embeddings = {"visual": unit(len(IDS), DIM, seed=3), "audio": unit(len(IDS), DIM, seed=4)}
    leaves = {name: values.requires_grad_() for name, values in embeddings.items()}
    losses = instance_losses(bank, batch_of(**leaves), **leaves, temperature=tau, directions=directions).losses
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    copies = {name: values.detach().clone().requires_grad_() for name, values in embeddings.items()}
    expected = torch.zeros(len(IDS))
    for query, key in directions:
        logits = copies[query] @ bank.columns[key].T / tau
        own = logits[torch.arange(len(IDS)), IDS]
        loss = logits.masked_fill(~PRESENT[key], -torch.inf).logsumexp(1) - own
        expected = expected + torch.where(PRESENT[query][IDS] & PRESENT[key][IDS], loss, torch.zeros_like(loss))
    torch.testing.assert_close(losses, expected)
    for gradient, expected_gradient in zip(
        gradients, torch.autograd.grad(expected.sum(), list(copies.values())), strict=True
    ):
        torch.testing.assert_close(gradient, expected_gradient)


def test_soft_targets_leave_out_rows_without_a_pair():
    visual, audio = unit(len(IDS), DIM, seed=3), unit(len(IDS), DIM, seed=4)
    softness = torch.full((len(IDS),), 0.5)
    losses = []
    for fill in (0.0, 1.0):
        bank = bank_with_missing_rows()
        for name, mask in PRESENT.items():
            bank.columns[name][~mask] = torch.nn.functional.normalize(torch.full((DIM,), fill + 0.1), dim=0)
        bank.refresh()
        batch = batch_of(visual, audio)
        result = instance_losses(bank, batch, visual, audio, 0.5, softness, SoftTargets("cycle"))
        losses.append(result.losses[PAIRED[IDS]])
    assert len(losses[0]) and bool(torch.isfinite(losses[0]).all())
    torch.testing.assert_close(losses[0], losses[1])


def test_a_modality_that_no_sample_has_causes_no_loss_and_no_nan():
    present = {"visual": torch.zeros(NUM_SAMPLES, dtype=torch.bool), "audio": torch.ones(NUM_SAMPLES, dtype=torch.bool)}
    bank = Bank(NUM_SAMPLES, DIM, 0.5, torch.device("cpu"), present=present)
    visual, audio = unit(len(IDS), DIM, seed=3).requires_grad_(), unit(len(IDS), DIM, seed=4).requires_grad_()
    valid = torch.ones(len(IDS), dtype=torch.bool)
    batch = GlobalBatch.gather(IDS, valid, visual, audio, {name: mask[IDS] for name, mask in present.items()})
    losses = instance_losses(bank, batch, visual, audio, 0.5).losses
    losses.sum().backward()
    assert losses.tolist() == [0.0] * len(IDS) and not audio.grad.any() and not visual.grad.any()
    assert not bank.has_modality("visual") and not bank.has_pairs() and bank.has_modality("audio")


def test_negatives_of_the_batch_leave_out_rows_of_a_missing_modality():
    visual, audio = unit(len(IDS), DIM, seed=3), unit(len(IDS), DIM, seed=4)
    losses = InBatchNegatives(batch_of(visual, audio), visual, audio, 0.5).losses(cross_entropy)
    expected = torch.zeros(len(IDS))
    for query, key, mask in ((visual, audio, PRESENT["audio"]), (audio, visual, PRESENT["visual"])):
        logits = query @ key.T / 0.5
        masked = logits.masked_fill(~mask[IDS] & ~torch.eye(len(IDS), dtype=torch.bool), -torch.inf)
        expected = expected + masked.logsumexp(1) - logits.diagonal()
    torch.testing.assert_close(losses[PAIRED[IDS]], expected[PAIRED[IDS]])


def test_sampled_negatives_leave_out_rows_of_a_missing_modality():
    bank = bank_with_missing_rows()
    visual, audio = unit(len(IDS), DIM, seed=3), unit(len(IDS), DIM, seed=4)
    negatives = SampledNegatives(bank, batch_of(visual, audio), visual, audio, 0.5, NegativeSampling(50, 0, 0))
    for scores, (_, key) in zip(negatives.scores, CROSS_MODAL, strict=True):
        assert torch.equal(torch.isinf(scores[:, 1:]), ~PRESENT[key][negatives.sampled._ids])
    assert bool(torch.isfinite(negatives.losses(cross_entropy)).all())


def test_similarity_exists_for_pairs_alone():
    bank = bank_with_missing_rows()
    assert torch.equal(torch.isfinite(bank.pair_similarity()), PAIRED)
    complete = Bank(
        NUM_SAMPLES, DIM, 0.5, torch.device("cpu"), present={"visual": PAIRED | True, "audio": PAIRED | True}
    )
    assert not complete.present and complete.key_bias("visual") is None
