"""Several ranks compute the same as one process."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
from distav.distributed.delayed_vote import DelayedVote
from distav.evaluation.metrics import retrieval
from distav.losses.active_complementary import active_complementary_loss
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.info_nce import InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.ivf import approximate_neighbors
from distav.memory.knn import nearest_neighbors
from distav.memory.negative_sampling import NegativeSampling
from distav.memory.softmax import attend, merge_across_ranks
from distav.models.av_model import AVModel
from distav.models.layers import GlobalBatchNorm
from distav.noise import label_model, rate_fit
from distav.noise.correction import Correction
from distav.noise.label_correction import correct_labels
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace
from tests.helpers.bank import global_batch_of, unit
from tests.helpers.spawn import on_ranks

NUM_SAMPLES, DIM = 37, 8
TABLES = ("held_out", "posterior", "visual_held_out", "visual_posterior", "audio_held_out", "audio_posterior")


def losses_and_gradients(replicated: bool = False) -> dict[str, Tensor]:
    """Losses of two contrastive steps of a small model with a global batch of 12, and gradients, bank and buffers.

    Gradients are averaged over the ranks, as DeepSpeed does.
    """
    torch.manual_seed(0)
    data = DataConfig(num_frames=2, frame_size=16, audio_s=0.25)
    config = ModelConfig(VisualConfig(width=4), AudioConfig(width=4), embed_dim=DIM, hidden_dim=16)
    model = AVModel(config, data, 8000, num_classes=5).train()
    bank = Bank(NUM_SAMPLES, DIM, 0.5, torch.device("cpu"), seed=4, num_categories=5, replicated=replicated)
    generator = torch.Generator().manual_seed(7)
    frames = torch.randint(0, 256, (12, 2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    audio = torch.randn(12, 2000, generator=generator) * 0.1
    ids = torch.randperm(NUM_SAMPLES, generator=generator)[:12]
    ids[11] = ids[0]
    weights = torch.rand(12, generator=generator)
    weights[3] = 0
    softness = torch.rand(12, generator=generator)
    frames, audio, ids = local_batch(frames), local_batch(audio), local_batch(ids)
    weights, softness = local_batch(weights), local_batch(softness)
    total = torch.zeros(())
    matching = torch.zeros_like(weights)
    for step in range(2):
        model.zero_grad()
        outputs = model(frames, audio, ids + 1000)
        global_batch = GlobalBatch.gather(ids, weights > 0, outputs["visual"], outputs["audio"])
        pair = outputs["visual"], outputs["audio"]
        logits = outputs["visual_categories"], outputs["audio_categories"]
        total = torch.zeros(())
        for kind in ("neighbor", "cycle"):
            soft = SoftTargets(kind, 0.1, 0.1, excludes_self=kind == "neighbor")
            soft_losses = instance_losses(bank, global_batch, *pair, 0.07, softness, soft).losses
            total = total + weighted_mean(soft_losses, weights)
        masked = instance_losses(bank, global_batch, *pair, 0.07, mask_uninitialized=True).losses
        sampled = SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(16, 0, step))
        in_batch = InBatchNegatives(global_batch, *pair, 0.07)
        score_loss = active_complementary_loss(softness, 5.0)
        instance = masked + sampled.losses(cross_entropy) + sampled.losses(score_loss) + in_batch.losses(score_loss)
        matching = matching + sampled.matching_probability() + in_batch.matching_probability()
        category = category_loss(*logits, weights, 1.0, bank.assignments.gram_matrices(), 1.0)
        supervised = F.cross_entropy(outputs["logits"], ids % 5, reduction="none")
        total = total + weighted_mean(instance, weights) + weighted_mean(supervised, weights)
        total = total + category.contrast + category.imbalance + category.row_entropy
        total.backward()
        bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)
    results = {
        f"grad {name}": all_reduce_sum_(parameter.grad.clone()) / get_world_size()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    results |= {f"bank {name}": all_gather_variable_rows(column) for name, column in bank.columns.items()}
    results |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    results["matching"] = all_gather_variable_rows(matching)
    results["gram"] = all_reduce_sum_(bank.assignments.gram.clone())
    return results | {"loss": all_reduce_sum_(total.detach().clone()) / get_world_size()}


@pytest.mark.parametrize(("num_ranks", "replicated"), [(2, False), (3, False), (4, False), (3, True)])
def test_losses_gradients_and_bank_equal_those_of_one_rank(num_ranks: int, replicated: bool):
    expected = losses_and_gradients()
    for results in on_ranks(num_ranks, losses_and_gradients, replicated):
        assert results.keys() == expected.keys()
        for name, value in expected.items():
            difference, norm = (results[name].double() - value).norm(), value.double().norm()
            assert difference <= 1e-3 * norm + 2e-4, f"{name}: difference {difference}, norm {norm}"


def own_rows(rows: Tensor) -> Tensor:
    own = shard_range(len(rows))
    return rows[own.start : own.stop]


def sharded_neighbors() -> tuple[Tensor, Tensor]:
    features = unit(NUM_SAMPLES, DIM, seed=1)
    features[5:9] = features[20]
    groups = torch.arange(NUM_SAMPLES) // 2
    valid = torch.ones(NUM_SAMPLES, dtype=torch.bool)
    valid[13] = False
    ring, gathered = (
        nearest_neighbors(own_rows(features), 6, groups, valid, gather_below_bytes=size) for size in (0, 10**9)
    )
    assert torch.equal(ring[0], gathered[0]) and torch.equal(ring[1], gathered[1])
    found = [ring]
    for k, probes in ((2, 1), (6, 100)):  # All lists are probed with 100.
        lists, gathered_lists = (
            approximate_neighbors(own_rows(features), k, groups, valid, probes, gather_below_bytes=size)
            for size in (0, 10**9)
        )
        assert torch.equal(lists[0], gathered_lists[0]) and torch.equal(lists[1], gathered_lists[1])
        found.append(lists)
    assert torch.equal(found[2][0], ring[0]) and torch.equal(found[2][1], ring[1])
    ids, similarity = (torch.cat(columns, 1) for columns in zip(*found, strict=True))
    return all_gather_variable_rows(ids), all_gather_variable_rows(similarity)


def correct_shard() -> Correction:
    """Correct labels of which every fifth is wrong; every fourth pair is mismatched, and one sample has no features."""
    sample = torch.arange(NUM_SAMPLES)
    true = sample % 3
    given = torch.where(sample % 5 == 0, (true + 1) % 3, true)
    audio_class = torch.where(sample % 4 == 1, (true + 2) % 3, true)
    visual, audio = (
        own_rows(2 * unit(3, DIM, seed=seed)[classes] + unit(NUM_SAMPLES, DIM, seed=seed + 2))
        for seed, classes in ((1, true), (2, audio_class))
    )
    search_space = VoteSearchSpace((4, 8), (0, 4), (0.1, 0.4), (0.0, 0.5), 6, min_log_likelihood_gain=1.0)
    has_modality = {"visual": sample != 7, "audio": (sample != 7) & (sample % 6 != 2)}
    spaces = [FeatureSpace("rows", visual, audio)]
    return correct_labels(spaces, given, 3, sample // 2, has_modality, search_space)


def sharded_correction() -> tuple[Tensor, Tensor, dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_fit, "GRID", rate_fit.GRID[::3])
        patch.setattr(label_model, "MISMATCH_GRID", label_model.MISMATCH_GRID[::3])
        correction = correct_shard()
    assert correction.has_signal
    columns = [getattr(correction, name) for name in TABLES] + [correction.correspondence[:, None]]
    rates = [
        correction.label_rate.estimate,
        correction.label_rate.ci95_low,
        correction.label_rate.ci95_high,
        correction.pair_rate.estimate,
        correction.visual_owner,
        correction.log_likelihood_gain,
    ]
    estimates = [torch.tensor(rates), correction.transition_matrix.flatten(), correction.rate_log_likelihood]
    return all_gather_variable_rows(torch.cat(columns, dim=1)), torch.cat(estimates), correction.selected_votes


def neighbors_and_correction() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, dict[str, str]]]:
    return sharded_neighbors(), sharded_correction()


def test_neighbors_and_corrections_equal_those_of_one_rank():
    expected_neighbors, (expected_probs, expected_estimates, expected_votes) = neighbors_and_correction()
    assert float((expected_probs[:, :3] - expected_probs[:, 3:6]).abs().max()) > 0.1
    for (ids, similarity), (probs, estimates, votes) in on_ranks(3, neighbors_and_correction):
        assert torch.equal(ids, expected_neighbors[0])
        torch.testing.assert_close(similarity, expected_neighbors[1])
        assert votes == expected_votes
        torch.testing.assert_close(probs, expected_probs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(estimates, expected_estimates, rtol=1e-3, atol=1e-3)


def sharded_attention(num_rows: int) -> tuple[Tensor, Tensor]:
    queries, keys = unit(12, DIM, seed=3), own_rows(unit(num_rows, DIM, seed=4))
    outputs = merge_across_ranks([attend(queries, keys, keys, 0.05), attend(queries, keys, keys, 0.5)])
    return all_gather_rows(outputs[0][0]), all_gather_rows(outputs[1][1])


def sharded_attentions() -> list[Tensor]:
    return [*sharded_attention(1), *sharded_attention(2), *sharded_attention(11)]


def test_attention_over_uneven_and_empty_shards_equals_that_of_one_rank():
    expected = sharded_attentions()
    for results in on_ranks(3, sharded_attentions):
        torch.testing.assert_close(results, expected)


def sharded_batch_norm() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    layer = GlobalBatchNorm(3).train()
    x = local_batch(torch.randn(12, 3, 5)).requires_grad_()
    out = layer(x)
    (out * local_batch(torch.linspace(-1, 1, 180).view(12, 3, 5))).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    gathered = all_gather_variable_rows(out), all_gather_variable_rows(x.grad)
    return *gathered, all_reduce_sum_(layer.weight.grad), layer.running_mean, layer.running_var


def test_global_batch_norm_equals_that_of_one_rank():
    expected = sharded_batch_norm()
    for results in on_ranks(2, sharded_batch_norm):
        torch.testing.assert_close(tuple(results), expected, rtol=1e-4, atol=1e-5)


def moments_of_large_values() -> tuple[Tensor, Tensor]:
    layer = GlobalBatchNorm(2, momentum=1.0).train()
    layer(local_batch(30 + 0.1 * torch.randn(12, 2, 50, generator=torch.Generator().manual_seed(3))))
    return layer.running_mean, layer.running_var


def test_moments_of_large_values_with_a_small_variance_do_not_depend_on_the_number_of_ranks():
    expected = moments_of_large_values()
    assert 0.005 < float(expected[1].min()) < float(expected[1].max()) < 0.02
    for results in on_ranks(3, moments_of_large_values):
        torch.testing.assert_close(tuple(results), expected, rtol=1e-6, atol=0)


def gathered_by_type() -> list[Tensor]:
    warnings.simplefilter("error", FutureWarning)  # PyTorch renames collectives.
    rank = get_rank()
    rows = [torch.full((2, 3), rank + 0.5), torch.tensor([rank > 0]), torch.tensor([[2**40 + rank]])]
    rows += [torch.full((2, 2), rank, dtype=torch.uint8).T, torch.zeros(0, 4), torch.full((3,), 0.1).bfloat16()]
    return [all_gather_rows(part) for part in rows]


def test_rows_of_every_type_and_shape_are_gathered_in_rank_order():
    for results in on_ranks(2, gathered_by_type):
        assert [tuple(part.shape) for part in results] == [(4, 3), (2,), (2, 1), (4, 2), (0, 4), (6,)]
        assert results[0][:, 0].tolist() == [0.5, 0.5, 1.5, 1.5] and results[1].tolist() == [False, True]
        assert results[2].flatten().tolist() == [2**40, 2**40 + 1] and results[3][:, 1].tolist() == [0, 0, 1, 1]
        assert results[5].dtype == torch.bfloat16


def delayed_votes() -> list[bool]:
    vote = DelayedVote()
    outcomes = [vote(get_rank() == step == 1) for step in range(4)]
    all_reduce_sum_(torch.zeros(1))  # A vote that is pending does not disturb other collectives.
    return outcomes


def test_ranks_learn_of_a_flag_at_the_call_after_it_was_set():
    assert on_ranks(2, delayed_votes) == [[False, False, True, False]] * 2
    vote = DelayedVote()
    assert [vote(False), vote(True)] == [False, True]


def bank_with_few_rows(num_rows: int) -> list[Tensor]:
    """Exchange rows with a bank in which some ranks own none."""
    bank = Bank(num_rows, DIM, 0.5, torch.device("cpu"), seed=4)
    ids = torch.arange(12) % num_rows
    batch_ids = local_batch(ids)
    visual, audio = local_batch(unit(12, DIM, seed=5)), local_batch(unit(12, DIM, seed=6))
    global_batch = global_batch_of(batch_ids, visual, audio)
    losses = instance_losses(bank, global_batch, visual, audio, 0.1).losses
    bank.update(global_batch, batch_ids.float())
    bank.store_column("wide", torch.arange(bank.rows.start, bank.rows.stop)[:, None].expand(-1, 3).float())
    agreement, wide = bank.fetch(("category_agreement", "wide"), global_batch.ids)
    assert torch.equal(wide, batch_ids[:, None].expand(-1, 3).float())
    owned_ids = bank.router.scatter_to_owners(batch_ids, global_batch.ids)
    assert torch.equal(owned_ids, ids[(ids >= bank.rows.start) & (ids < bank.rows.stop)])
    assert torch.equal(bank.router.gather_from_owners(owned_ids, global_batch.ids), batch_ids)
    columns = bank.gather_column("visits"), bank.gather_column("pair_similarity")
    return [all_gather_rows(losses), all_gather_rows(agreement), *columns]


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_a_bank_can_have_fewer_rows_than_ranks(num_rows: int):
    expected = bank_with_few_rows(num_rows)
    for results in on_ranks(4, bank_with_few_rows, num_rows):
        torch.testing.assert_close(results, expected)


def bank_state(parts: list[dict[str, Tensor]] | None, replicated: bool) -> dict[str, Tensor]:
    """State of this rank's bank, after an update or restored from the states of other ranks."""
    bank = Bank(NUM_SAMPLES, DIM, 0.5, torch.device("cpu"), seed=9, num_categories=2, replicated=replicated)
    if parts:
        bank.restore(parts)
        visual = all_gather_variable_rows(bank.columns["visual"])
        assert torch.equal(bank.keys("visual"), visual[bank.resident.start : bank.resident.stop])
    else:
        global_batch = global_batch_of(torch.arange(6), unit(6, DIM, seed=1), unit(6, DIM, seed=2))
        bank.update(global_batch, torch.ones(6), torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)))
        bank.store_column("votes", torch.ones(len(bank.rows), 2))
    return bank.state()


@pytest.mark.parametrize("replicated", [False, True])
def test_any_number_of_ranks_restores_the_state_of_any_other(replicated: bool):
    saved = on_ranks(3, bank_state, None, replicated)
    restored_on_2 = on_ranks(2, bank_state, saved, replicated)
    restored_on_1 = bank_state(restored_on_2, False)
    for name, column in restored_on_1.items():
        if name != "range":
            assert torch.equal(torch.cat([part[name] for part in saved]), column), name


def sum_with_gradient() -> tuple[float, float]:
    x = torch.tensor(float(get_rank() + 1), requires_grad=True)
    total = all_reduce_sum(x)
    (total**2).backward()
    assert x.grad is not None
    return total.item(), x.grad.item()


def test_all_reduce_sum_receives_the_gradients_of_all_ranks():
    # Each of two ranks computes (1 + 2)^2; both gradients of 6 are summed on every rank.
    assert on_ranks(2, sum_with_gradient) == [(3.0, 12.0), (3.0, 12.0)]


def sharded_retrieval() -> dict[str, float]:
    visual, audio = unit(NUM_SAMPLES, 4, seed=1), unit(NUM_SAMPLES, 4, seed=2)
    audio[3] = audio[5] = audio[6]
    return retrieval(own_rows(visual), own_rows(audio), own_rows(torch.arange(NUM_SAMPLES) % 3))


def test_retrieval_equals_that_of_one_rank():
    expected = sharded_retrieval()
    for metrics in on_ranks(3, sharded_retrieval):
        assert metrics == pytest.approx(expected)
