"""A training step with the memory bank never makes the host wait for the device."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from distav.losses.active_complementary import active_complementary_loss, rescale_matching_probability
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.classification import hybrid_targets
from distav.losses.info_nce import WITHIN_MODAL, InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory import attention_backends, fused_attention
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling
from tests.helpers.bank import global_batch_of, unit
from tests.helpers.synchronizations import Synchronizations

DIM, CATEGORIES = 16, 5
KINDS = ["none", "bootstrapping", "swapped", "neighbor", "cycle"]


def new_bank(dtype: torch.dtype = torch.float32) -> Bank:
    return Bank(50, DIM, 0.5, torch.device("cpu"), seed=3, num_categories=CATEGORIES, dtype=dtype)


def batch_of(ids: Tensor) -> GlobalBatch:
    return global_batch_of(ids, unit(len(ids), DIM, seed=1), unit(len(ids), DIM, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_does_not_wait(dtype: torch.dtype):
    bank = new_bank(dtype)
    ids, probs = torch.tensor([3, 9, 3, 49]), torch.rand(4, 2, CATEGORIES)
    with Synchronizations() as waits:
        global_batch = batch_of(ids)
        bank.update(global_batch, torch.ones(4), probs)
        bank.write("correspondence", torch.rand(4), global_batch.ids, global_batch.valid)
        bank.fetch(("visual", "correspondence"), global_batch.ids)
        bank.assignments.gram_matrices()
    assert waits.found == []


@pytest.mark.parametrize("learns_temperature", [False, True])
@pytest.mark.parametrize("excludes_self", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_instance_loss_does_not_wait(kind: str, excludes_self: bool, learns_temperature: bool):
    bank, ids = new_bank(), torch.tensor([3, 9, 3, 49])
    temperature = torch.tensor(0.07, requires_grad=True) if learns_temperature else 0.07
    soft = SoftTargets(kind, 0.1, 0.1, excludes_self)
    pair = [unit(4, DIM, seed=seed).requires_grad_() for seed in (5, 6)]
    arguments = bank, batch_of(ids), *pair, temperature

    def step() -> None:
        losses = instance_losses(*arguments, torch.ones(4), soft, mask_uninitialized=True).losses
        losses = losses + instance_losses(*arguments, directions=WITHIN_MODAL).losses
        weighted_mean(losses, torch.ones(4)).backward()

    step()  # Attention backends run their self-test on first use.
    with Synchronizations() as waits:
        step()
    assert waits.found == []


def test_other_losses_do_not_wait():
    bank, ids = new_bank(), torch.tensor([3, 9, 3, 49])
    pair = [unit(4, DIM, seed=seed).requires_grad_() for seed in (5, 6)]
    global_batch, logits = batch_of(ids), torch.rand(2, 4, CATEGORIES).requires_grad_()
    with Synchronizations() as waits:
        in_batch = InBatchNegatives(global_batch, *pair, 0.07)
        sampled = SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(16, 0, 1))
        for negatives in (in_batch, sampled):
            loss = weighted_mean(negatives.losses(active_complementary_loss(torch.rand(4), 5.0)), torch.ones(4))
            loss = loss + weighted_mean(negatives.losses(cross_entropy), torch.ones(4))
            loss.backward()
            rescale_matching_probability(negatives.matching_probability(), negatives.num_candidates(), 10)
        category = category_loss(*logits, torch.rand(4), 1.0, bank.assignments.gram_matrices())
        (category.contrast + category.imbalance + category.row_entropy).backward()
        bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)
        rescale_matching_probability(torch.rand(4), bank.num_samples, 10)
        hybrid_targets(ids % 3, torch.rand(4, 3), torch.rand(4))
    assert waits.found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_pass_on_a_gpu_mixes_no_devices_and_does_not_wait(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Runs on tensors with a device and a shape but no values; only FlexAttention needs values and is replaced."""

    def flex(queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, exclude: Tensor | None):
        assert keys.shape == values.shape and queries.shape[0] == keys.shape[0] == 9 and scale.dim() == 0
        assert bias is None or bias.shape == (9, keys.shape[2])
        assert exclude is None or exclude.shape == (9, queries.shape[2], 1)
        assert {tensor.device.type for tensor in (keys, scale, bias, exclude) if tensor is not None} == {"cuda"}
        return queries.new_empty(queries.shape[:3]), torch.empty_like(queries)

    monkeypatch.setattr(attention_backends, "self_test", lambda *_arguments: "")
    monkeypatch.setattr(fused_attention, "_compiled_flex", lambda: flex)
    monkeypatch.setattr(fused_attention, "_num_parts", lambda _queries, _num_keys: 9)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(), torch.no_grad():
        bank = Bank(5003, 128, 0.5, gpu, num_categories=CATEGORIES, dtype=dtype)
        ids, ones = torch.zeros(300, dtype=torch.int64, device=gpu), torch.ones(300, device=gpu)
        pair, logits = torch.randn(2, 300, 128, device=gpu), torch.randn(2, 300, CATEGORIES, device=gpu)
        with Synchronizations() as waits:
            global_batch = GlobalBatch.gather(ids, ids >= 0, *pair)
            for kind in KINDS:
                for temperature in (0.07, torch.full((), 0.07, device=gpu)):
                    for flag in (False, True):
                        soft = SoftTargets(kind, 0.1, 0.1, excludes_self=flag)
                        arguments = bank, global_batch, *pair, temperature, ones, soft
                        weighted_mean(instance_losses(*arguments, mask_uninitialized=flag).losses, ones)
            InBatchNegatives(global_batch, *pair, 0.07).losses(active_complementary_loss(ones, 5.0))
            negatives = SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(64, 0, 1))
            matching = rescale_matching_probability(negatives.matching_probability(), negatives.num_candidates(), 10)
            negatives.sampled.weighted_sums(matching[:, None].expand(-1, 64), "audio")
            category = category_loss(*logits, ones, 1.0, bank.assignments.gram_matrices())
            bank.write("correspondence", bank.fetch(("correspondence",), ids)[0], ids, global_batch.valid)
            bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)
            bank.refresh()
            bank.reinitialize()
    assert waits.found == []
