"""What several ranks compute together equals what one process computes alone."""

import pytest
import torch
import torch.nn.functional as F

from distav.config.model import AudioConfig, ModelConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.distributed.collectives import (
    all_gather_rows,
    all_gather_variable_rows,
    all_reduce_sum,
    all_reduce_sum_,
    get_rank,
    get_world_size,
    local_batch,
    shard_range,
)
from distav.evaluation.metrics import retrieval
from distav.losses.active_complementary import active_complementary_loss
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.info_nce import InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.knn import nearest_neighbors
from distav.memory.negative_sampling import NegativeSampling
from distav.memory.softmax import attend, merge_across_ranks
from distav.models.av_model import AVModel
from distav.models.layers import GlobalBatchNorm
from distav.noise.label_correction import FeatureSpace, VoteSearchSpace, correct_labels
from tests.helpers.spawn import on_ranks

NUM, DIM = 37, 8


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def losses_and_gradients(replicated: bool = False) -> dict[str, torch.Tensor]:
    """Run the loss of phase 1 on a small model over a global batch of 12; gradients averaged as DeepSpeed does."""
    torch.manual_seed(0)
    data = DataConfig(num_frames=2, frame_size=16, audio_s=0.25)
    settings = ModelConfig(VisualConfig(width=4), AudioConfig(width=4), embed_dim=DIM, hidden_dim=16)
    model = AVModel(settings, data, 8000, num_classes=5).train()
    bank = Bank(NUM, DIM, 0.5, torch.device("cpu"), seed=4, num_categories=5, replicated=replicated)
    generator = torch.Generator().manual_seed(7)
    frames = torch.randint(0, 256, (12, 2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    sound = torch.randn(12, 2000, generator=generator) * 0.1
    ids = torch.randperm(NUM, generator=generator)[:12]
    ids[11] = ids[0]
    weights = torch.rand(12, generator=generator)
    weights[3] = 0
    softness = torch.rand(12, generator=generator)
    frames, sound, ids, weights, softness = map(local_batch, (frames, sound, ids, weights, softness))
    total = torch.zeros(())
    matching = torch.zeros_like(weights)
    for step in range(2):
        model.zero_grad()
        out = model(frames, sound, ids + 1000)
        global_batch = GlobalBatch.gather(ids, weights > 0, out["visual"], out["audio"])
        pair = out["visual"], out["audio"]
        logits = out["visual_categories"], out["audio_categories"]
        total = torch.zeros(())
        for kind in ("neighbor", "cycle"):
            soft = SoftTargets(kind, 0.1, 0.1, excludes_self=kind == "neighbor")
            found = instance_losses(bank, global_batch, *pair, 0.07, softness, soft)
            total = total + weighted_mean(found.losses, weights)
        masked = instance_losses(bank, global_batch, *pair, 0.07, mask_uninitialized=True).losses
        drawn = SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(16, 0, step))
        batch = InBatchNegatives(global_batch, *pair, 0.07)
        loss_of = active_complementary_loss(softness, 5.0)
        apart = masked + drawn.losses(cross_entropy) + drawn.losses(loss_of) + batch.losses(loss_of)
        matching = matching + drawn.matching_probability() + batch.matching_probability()
        category = category_loss(*logits, weights, 1.0, bank.assignments.gram_matrices(), 1.0)
        supervised = F.cross_entropy(out["logits"], ids % 5, reduction="none")
        total = total + weighted_mean(apart, weights) + weighted_mean(supervised, weights)
        total = total + category.contrast + category.imbalance + category.row_entropy
        total.backward()
        bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)
    found = {
        f"grad {name}": all_reduce_sum_(each.grad.clone()) / get_world_size()
        for name, each in model.named_parameters()
        if each.grad is not None
    }
    found |= {f"bank {name}": all_gather_variable_rows(column) for name, column in bank.columns.items()}
    found |= {f"buffer {name}": each.clone() for name, each in model.named_buffers()}
    found["matching"] = all_gather_variable_rows(matching)
    found["categories of all"] = all_reduce_sum_(bank.assignments.gram.clone())
    return found | {"loss": all_reduce_sum_(total.detach().clone()) / get_world_size()}


@pytest.mark.parametrize(("ranks", "replicated"), [(2, False), (3, False), (4, False), (3, True)])
def test_losses_gradients_and_bank_equal_those_of_one_rank(ranks: int, replicated: bool):
    alone = losses_and_gradients()
    for together in on_ranks(ranks, losses_and_gradients, replicated):
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            difference, size = (together[name].double() - value).norm(), value.double().norm()
            assert difference <= 1e-3 * size + 2e-4, f"{name}: off by {difference} of {size}"


def neighbors_of_part() -> tuple[torch.Tensor, torch.Tensor]:
    features = unit(NUM, DIM, seed=1)
    features[5:9] = features[20]
    groups = torch.arange(NUM) // 2
    valid = torch.ones(NUM, dtype=torch.bool)
    valid[13] = False
    own = shard_range(NUM)
    mine = features[own.start : own.stop]
    ways = [nearest_neighbors(mine, 6, groups, valid, gather_below_bytes=size) for size in (0, 10**9)]
    assert all(torch.equal(ring, gathered) for ring, gathered in zip(*ways, strict=True))
    return all_gather_variable_rows(ways[0][0]), all_gather_variable_rows(ways[0][1])


def correction_of_part() -> torch.Tensor:
    own = shard_range(NUM)
    part = slice(own.start, own.stop)
    every = torch.ones(NUM, dtype=torch.bool)
    voting = VoteSearchSpace((4, 8), (0, 4), (0.1, 0.4), (0.0, 0.5), 6)
    given = torch.arange(NUM) % 3
    visual, audio = unit(NUM, DIM, seed=1)[part], unit(NUM, DIM, seed=2)[part]
    found = correct_labels([FeatureSpace("rows", visual, audio)], given, 3, torch.arange(NUM), every, voting)
    return all_gather_variable_rows(
        torch.cat([found.held_out, found.posterior, found.audio_posterior, found.correspondence[:, None]], dim=1)
    )


def neighbors_and_correction() -> tuple[torch.Tensor, ...]:
    return *neighbors_of_part(), correction_of_part()


def test_neighbors_and_corrections_equal_those_of_one_rank():
    ids, similarity, votes = neighbors_and_correction()
    for found in on_ranks(3, neighbors_and_correction):
        assert torch.equal(found[0], ids)
        torch.testing.assert_close(found[1], similarity)
        torch.testing.assert_close(found[2], votes, rtol=1e-4, atol=1e-5)


def attention_of_part(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = unit(12, DIM, seed=3), unit(rows, DIM, seed=4)
    own = shard_range(rows)
    part = keys[own.start : own.stop]
    found = merge_across_ranks([attend(queries, part, part, 0.05), attend(queries, part, part, 0.5)])
    return all_gather_rows(found[0][0]), all_gather_rows(found[1][1])


def attentions() -> list[torch.Tensor]:
    return [each for rows in (1, 2, 11) for each in attention_of_part(rows)]


def test_attention_over_ragged_and_empty_shards_equals_the_whole():
    whole = attentions()
    for found in on_ranks(3, attentions):
        for ours, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, expected)


def normalised_part() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    layer = GlobalBatchNorm(3).train()
    x = local_batch(torch.randn(12, 3, 5)).requires_grad_()
    out = layer(x)
    (out * local_batch(torch.linspace(-1, 1, 180).view(12, 3, 5))).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    gathered = [all_gather_variable_rows(each) for each in (out, x.grad)]
    return *gathered, all_reduce_sum_(layer.weight.grad), layer.running_mean, layer.running_var


def test_global_batch_norm_equals_that_of_the_whole_batch():
    alone = normalised_part()
    for found in on_ranks(2, normalised_part):
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def bank_of_part(num: int) -> list[torch.Tensor]:
    """More ranks than rows: fetch from, deliver to and write a bank in which some ranks own nothing."""
    bank = Bank(num, DIM, 0.5, torch.device("cpu"), seed=4)
    ids = torch.arange(12) % num
    mine = local_batch(ids)
    visual, audio = local_batch(unit(12, DIM, seed=5)), local_batch(unit(12, DIM, seed=6))
    global_batch = GlobalBatch.gather(mine, torch.ones_like(mine, dtype=torch.bool), visual, audio)
    losses = instance_losses(bank, global_batch, visual, audio, 0.1).losses
    bank.update(global_batch, mine.float())
    bank.store_column("wide", torch.arange(bank.rows.start, bank.rows.stop)[:, None].expand(-1, 3).float())
    fetched = bank.fetch(("category_agreement", "wide"), global_batch.ids)
    assert torch.equal(fetched[1], mine[:, None].expand(-1, 3).float())
    delivered = bank.router.scatter_to_owners(mine, global_batch.ids)
    assert torch.equal(delivered, ids[(ids >= bank.rows.start) & (ids < bank.rows.stop)])
    return [
        all_gather_rows(losses),
        all_gather_rows(fetched[0]),
        *map(bank.gather_column, ("visits", "pair_similarity")),
    ]


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_bank_may_have_fewer_rows_than_ranks(num: int):
    alone = bank_of_part(num)
    for found in on_ranks(4, bank_of_part, num):
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected)


def saved_and_restored(parts: list[dict[str, torch.Tensor]] | None, replicated: bool) -> dict[str, torch.Tensor]:
    """Return the state of this rank's bank, taken from the parts that other ranks saved."""
    bank = Bank(NUM, DIM, 0.5, torch.device("cpu"), seed=9, num_categories=2, replicated=replicated)
    if parts:
        bank.restore(parts)
        every = all_gather_variable_rows(bank.columns["visual"])
        held = every[bank.resident.start : bank.resident.stop]
        assert torch.equal(bank.keys("visual"), held)
    else:
        ids, ones = torch.arange(6), torch.ones(6)
        global_batch = GlobalBatch.gather(ids, ones > 0, unit(6, DIM, seed=1), unit(6, DIM, seed=2))
        bank.update(global_batch, ones, torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)))
        bank.store_column("votes", torch.ones(len(bank.rows), 2))
    return bank.state()


@pytest.mark.parametrize("replicated", [False, True])
def test_state_goes_from_any_number_of_ranks_to_any_other(replicated: bool):
    parts = on_ranks(3, saved_and_restored, None, replicated)
    again = on_ranks(2, saved_and_restored, parts, replicated)
    (alone,) = [saved_and_restored(again, False)]
    for name in alone:
        if name != "range":
            assert torch.equal(torch.cat([part[name] for part in parts]), alone[name]), name


def sum_with_gradient() -> tuple[float, float]:
    x = torch.tensor(float(get_rank() + 1), requires_grad=True)
    total = all_reduce_sum(x)
    (total**2).backward()
    assert x.grad is not None
    return total.item(), x.grad.item()


def test_sums_carry_the_gradient_of_all_ranks():
    # Each of two ranks computes (1 + 2)^2; the gradients of both, 6 each, arrive at every rank.
    assert on_ranks(2, sum_with_gradient) == [(3.0, 12.0), (3.0, 12.0)]


def retrieval_of_part(rows: int) -> dict[str, float]:
    visual, audio = unit(rows, 4, seed=1), unit(rows, 4, seed=2)
    audio[3] = audio[5] = audio[6]
    own = shard_range(rows)
    part = slice(own.start, own.stop)
    return retrieval(visual[part], audio[part], (torch.arange(rows) % 3)[part])


def test_retrieval_over_ranks_equals_that_of_one():
    assert all(found == pytest.approx(retrieval_of_part(NUM)) for found in on_ranks(3, retrieval_of_part, NUM))
