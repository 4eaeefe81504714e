"""Ranks that share a memory bank wait for the device once per batch, for the numbers of rows to exchange."""

import pytest
import torch

from distav.distributed.collectives import local_batch
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from tests.helpers.bank import unit
from tests.helpers.spawn import on_ranks
from tests.helpers.synchronizations import Synchronizations

NUM_SAMPLES, DIM, CATEGORIES = 37, 8, 5


def step(bank: Bank, seed: int) -> None:
    ids = local_batch(torch.randint(NUM_SAMPLES, (12,), generator=torch.Generator().manual_seed(seed)))
    pair = [local_batch(unit(12, DIM, seed=seed + offset)).requires_grad_() for offset in (1, 2)]
    global_batch, ones = GlobalBatch.gather(ids, ids >= 0, *pair), torch.ones(len(ids))
    losses = instance_losses(bank, global_batch, *pair, 0.07, ones, SoftTargets("neighbor", 0.1, 0.1)).losses
    category = category_loss(*torch.rand(2, len(ids), CATEGORIES), ones, 1.0, bank.assignments.gram_matrices())
    (weighted_mean(losses, ones) + category.contrast).backward()
    correspondence = bank.fetch(("correspondence", "category_agreement"), global_batch.ids)[0]
    bank.write("correspondence", correspondence / 2, global_batch.ids, global_batch.valid)
    bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)


def waits_by_step(replicated: bool) -> list[list[str]]:
    bank = Bank(NUM_SAMPLES, DIM, 0.5, torch.device("cpu"), num_categories=CATEGORIES, replicated=replicated)
    step(bank, 0)  # attention backends run their self-test on first use
    steps = []
    for seed in (1, 2):
        with Synchronizations() as waits:
            step(bank, seed)
        steps.append(waits.found)
    return steps


@pytest.mark.parametrize("replicated", [False, True])
def test_ranks_wait_once_per_batch(replicated: bool):
    for steps in on_ranks(3, waits_by_step, replicated):
        assert [len(waits) for waits in steps] == [1, 1], steps
        assert "tolist" in steps[0][0] and "row_router.py" in steps[0][0]
