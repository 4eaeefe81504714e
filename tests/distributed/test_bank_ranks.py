"""Ranks that share a bank wait for the device once a batch, to learn how many rows go where."""

import pytest
import torch
import torch.nn.functional as F

from distav.distributed.collectives import local_batch
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from tests.helpers.spawn import on_ranks
from tests.helpers.synchronizations import Synchronizations

NUM, DIM, CATEGORIES = 37, 8, 5


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def step(bank: Bank, seed: int) -> None:
    ids = local_batch(torch.randint(NUM, (12,), generator=torch.Generator().manual_seed(seed)))
    pair = [local_batch(unit(12, DIM, seed=seed + each)).requires_grad_() for each in (1, 2)]
    global_batch, ones = GlobalBatch.gather(ids, ids >= 0, *pair), torch.ones(len(ids))
    losses = instance_losses(bank, global_batch, *pair, 0.07, ones, SoftTargets("neighbor", 0.1, 0.1)).losses
    category = category_loss(*torch.rand(2, len(ids), CATEGORIES), ones, 1.0, bank.assignments.gram_matrices())
    (weighted_mean(losses, ones) + category.contrast).backward()
    believed = bank.fetch(("correspondence", "category_agreement"), global_batch.ids)[0]
    bank.write("correspondence", believed / 2, global_batch.ids, global_batch.valid)
    bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)


def waits_of_steps(replicated: bool) -> list[list[str]]:
    bank = Bank(NUM, DIM, 0.5, torch.device("cpu"), num_categories=CATEGORIES, replicated=replicated)
    step(bank, 0)  # the back ends are tried on first use
    found = []
    for seed in (1, 2):
        with Synchronizations() as waits:
            step(bank, seed)
        found.append(waits.found)
    return found


@pytest.mark.parametrize("replicated", [False, True])
def test_ranks_wait_once_a_batch(replicated: bool):
    for steps in on_ranks(3, waits_of_steps, replicated):
        assert [len(waits) for waits in steps] == [1, 1], steps
        assert "tolist" in steps[0][0] and "row_router.py" in steps[0][0]
