"""Contrastive objectives: which losses they compute, and when refined correspondences apply."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.config.phases import ContrastivePhase, InstanceLoss, SoftTargetKind
from distav.losses.active_complementary import active_complementary_loss
from distav.losses.contrastive_objectives import (
    InBatchObjective,
    MemoryBankObjective,
    PairBatch,
    PairLosses,
    RefineCorrespondence,
    SampledObjective,
    select_objective,
)
from distav.losses.info_nce import InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling, Partition

IDS = torch.tensor([3, 11, 7])
STORED = torch.tensor([0.2, 1.0, 0.6])
REFINED = torch.tensor([0.1, 0.9, 0.5])


def make_bank() -> Bank:
    bank = Bank(20, 8, 0.5, torch.device("cpu"), seed=1)
    correspondence = torch.ones(20)
    correspondence[IDS] = STORED
    bank.set_correspondence(correspondence)
    return bank


def make_pairs(refine: RefineCorrespondence | None = None) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    visual, audio = (F.normalize(torch.randn(3, 8, generator=generator), dim=1) for _ in range(2))
    global_batch = GlobalBatch.gather(IDS, torch.ones(3, dtype=torch.bool), visual, audio)
    return PairBatch(global_batch, visual, audio, 0.1, 0.5, 4, refine)


def losses_of(config: ContrastivePhase, pairs: PairBatch) -> PairLosses:
    return select_objective(config)(config, make_bank(), 9, Partition())(pairs)


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (ContrastivePhase(), MemoryBankObjective),
        (ContrastivePhase(num_negatives=8), SampledObjective),
        (ContrastivePhase(negatives_source="sampled", num_negatives=8), SampledObjective),
        (ContrastivePhase(negatives_source="batch"), InBatchObjective),
    ],
)
def test_settings_select_the_objective(config: ContrastivePhase, objective: type):
    assert select_objective(config) is objective


@pytest.mark.parametrize("for_all", [False, True])
def test_memory_bank_softens_targets_by_correspondence(for_all: bool):
    pairs = make_pairs()
    result = losses_of(ContrastivePhase(soft_target_weight=0.4, soft_targets_for_all=for_all), pairs)
    softness = 0.5 * 0.4 * (torch.ones(3) if for_all else 1 - STORED)
    expected = instance_losses(
        make_bank(), pairs.global_batch, pairs.visual, pairs.audio, 0.1, softness, SoftTargets("cycle", 0.02, 0.07)
    )
    torch.testing.assert_close(result.losses, expected.losses)
    torch.testing.assert_close(result.correspondence, STORED)
    assert not result.includes_weights


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("loss", InstanceLoss)
def test_few_candidates_use_refined_correspondences_at_once(loss: InstanceLoss, sampled: bool):
    refined_from: list[Tensor] = []

    def refine(matching: Tensor, num_candidates: Tensor | int) -> Tensor:
        refined_from.extend([matching, torch.as_tensor(num_candidates)])
        return REFINED

    pairs = make_pairs(refine)
    source = {"num_negatives": 5} if sampled else {"negatives_source": "batch"}
    config = ContrastivePhase(loss=loss, soft_targets=SoftTargetKind.none, complementary_weight=2.0, **source)
    result = losses_of(config, pairs)
    arguments = pairs.global_batch, pairs.visual, pairs.audio, 0.1
    if sampled:
        negatives = SampledNegatives(make_bank(), *arguments, NegativeSampling(5, 9, 4))
    else:
        negatives = InBatchNegatives(*arguments)
    score_loss = cross_entropy
    if loss is InstanceLoss.acl:
        score_loss = active_complementary_loss(1 + 0.5 * (REFINED - 1), 2.0)
    torch.testing.assert_close(result.losses, negatives.losses(score_loss))
    torch.testing.assert_close(refined_from[0], negatives.matching_probability())
    assert refined_from[1].tolist() == [6 if sampled else 3] * 3
    assert result.correspondence is REFINED and result.includes_weights == (loss is InstanceLoss.acl)


def test_memory_bank_uses_stored_correspondences_and_refines_for_the_next_visit():
    calls: list[tuple[Tensor, Tensor | int]] = []

    def refine(matching: Tensor, num_candidates: Tensor | int) -> Tensor:
        calls.append((matching, num_candidates))
        return REFINED

    result = losses_of(ContrastivePhase(), make_pairs(refine))
    torch.testing.assert_close(result.correspondence, STORED)
    assert len(calls) == 1 and calls[0][1] == 20 and calls[0][0].shape == (3,)


def test_noise_contrastive_estimation_sets_the_partition_once():
    config = ContrastivePhase(num_negatives=5, soft_targets=SoftTargetKind.none, nce=True)
    partition = Partition()
    objective = SampledObjective(config, make_bank(), 9, partition)
    first = objective(make_pairs()).losses
    value = partition.value
    assert value is not None and value > 0
    torch.testing.assert_close(objective(make_pairs()).losses, first)
    assert partition.value == value
