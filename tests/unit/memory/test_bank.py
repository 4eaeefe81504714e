import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.rng import sample_seeds, uniform
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import sample_negative_ids
from tests.helpers.bank import filled_bank, global_batch_of, unit

CPU = torch.device("cpu")


def test_an_update_averages_repeated_ids_and_ignores_values_that_are_not_finite():
    bank = filled_bank(6, 4)
    before = bank.columns["visual"].clone()
    ids, valid = torch.tensor([2, 2, 4, 5, 1]), torch.tensor([True, True, True, False, True])
    visual, audio = unit(5, 4, seed=3), unit(5, 4, seed=4)
    visual[2, 0] = math.nan
    bank.update(global_batch_of(ids, visual, audio, valid), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5]))
    after = bank.columns["visual"]
    torch.testing.assert_close(after[2], F.normalize(0.5 * before[2] + 0.5 * visual[:2].mean(0), dim=0))
    torch.testing.assert_close(after[1], F.normalize(0.5 * before[1] + 0.5 * visual[4], dim=0))
    for unchanged in (0, 3, 4, 5):
        assert torch.equal(after[unchanged], before[unchanged])
    assert bank.columns["visits"].tolist() == [1, 2, 2, 1, 1, 1]
    assert bank.columns["category_agreement"][2] == pytest.approx(0.75)
    torch.testing.assert_close(bank.columns["pair_similarity"], (after * bank.columns["audio"]).sum(1))


def update_row_by_row(
    bank: Bank, global_batch: GlobalBatch, agreement: Tensor, category_probs: Tensor
) -> dict[str, Tensor]:
    """Columns after an update that processes one row after the other."""
    after = {name: column.clone() for name, column in bank.columns.items()}
    finite = torch.isfinite(global_batch.visual.sum(1)) & torch.isfinite(global_batch.audio.sum(1))
    values = torch.cat([agreement[:, None], category_probs.flatten(1)], dim=1)
    for row in global_batch.ids.unique().tolist():
        usable = (global_batch.ids == row) & global_batch.valid & finite
        if usable.any():
            for name, embeddings in (("visual", global_batch.visual), ("audio", global_batch.audio)):
                after[name][row] = F.normalize(0.5 * after[name][row] + 0.5 * embeddings[usable].mean(0), dim=0)
            after["visits"][row] += 1
            after["pair_similarity"][row] = after["visual"][row] @ after["audio"][row]
        usable &= torch.isfinite(values.sum(1))
        if usable.any():
            mean = values[usable].mean(0)
            after["category_agreement"][row] = 0.5 * after["category_agreement"][row] + 0.5 * mean[0]
            after["categories"][row] = (mean[1:].view(2, -1).clamp(0, 1) * 127).round().to(torch.uint8)
    return after


@pytest.mark.parametrize("valid_fraction", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("with_repeats", [False, True])
def test_an_update_writes_each_row_once_and_no_other_rows(with_repeats: bool, valid_fraction: float):
    generator = torch.Generator().manual_seed(0)
    bank = Bank(40, 16, 0.5, CPU, seed=3, num_categories=5)
    for step in range(6):
        ids = torch.randperm(40, generator=generator)[:20]
        if with_repeats:
            ids = torch.randint(12, (20,), generator=generator)
        visual, audio = unit(20, 16, seed=10 * step), unit(20, 16, seed=10 * step + 1)
        agreement, probs = torch.rand(20, generator=generator), torch.rand(20, 2, 5, generator=generator)
        valid = torch.ones(20, dtype=torch.bool)
        if valid_fraction < 1:
            valid = torch.rand(20, generator=generator) < valid_fraction
            visual[3, 0], audio[5, 0], agreement[7], probs[8, 1, 2] = math.nan, math.inf, math.nan, math.inf
        global_batch = GlobalBatch.gather(ids, valid, visual, audio)
        expected = update_row_by_row(bank, global_batch, agreement, probs)
        bank.update(global_batch, agreement, probs)
        unchanged = ~torch.isin(torch.arange(40), ids[valid])
        for name, column in expected.items():
            torch.testing.assert_close(bank.columns[name], column, rtol=1e-6, atol=1e-6)
            assert torch.equal(bank.columns[name][unchanged], column[unchanged])
        stored = bank.columns["categories"]
        visual_probs, audio_probs = stored.double().unbind(1)
        factors = [(visual_probs, visual_probs), (visual_probs, audio_probs), (audio_probs, audio_probs)]
        assert torch.equal(bank.assignments.gram, torch.stack([left.T @ right for left, right in factors]))
        assert bank.assignments.num_assigned == stored.flatten(1).any(1).sum()


def test_a_batch_can_have_one_sample():
    bank = Bank(50, 8, 0.5, CPU)
    global_batch = global_batch_of(torch.tensor([2**40 + 1]), unit(1, 8), unit(1, 8, seed=1))
    assert global_batch.ids.tolist() == [2**40 + 1] and global_batch.valid.tolist() == [True]
    bank.update(global_batch_of(torch.tensor([7]), unit(1, 8), unit(1, 8, seed=1)), torch.ones(1))
    assert bank.columns["visits"].nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(("num_samples", "dim"), [(1, 8), (5000, 128), (20_000, 33)])
def test_initial_rows_do_not_depend_on_the_tiles(num_samples: int, dim: int):
    bank = Bank(num_samples, dim, 0.5, CPU, seed=3, dtype=torch.bfloat16)
    for name, stream in (("visual", 1), ("audio", 2)):
        draws = uniform(sample_seeds(3, 0, torch.arange(num_samples)), stream, 2 * dim).clamp_min(1e-7)
        radius, angle = (-2 * draws[:, :dim].log()).sqrt(), 2 * math.pi * draws[:, dim:]
        assert torch.equal(bank.columns[name], F.normalize(radius * angle.cos(), dim=1))
        assert torch.equal(bank.keys(name), bank.columns[name].bfloat16())
    assert torch.equal(bank.columns["pair_similarity"], (bank.columns["visual"] * bank.columns["audio"]).sum(1))
    state = bank.state()
    bank.update(global_batch_of(torch.arange(1), unit(1, dim, seed=1), unit(1, dim, seed=2)), torch.ones(1))
    bank.reinitialize()
    assert all(torch.equal(column, state[name]) for name, column in bank.columns.items())
    assert all(torch.equal(bank.keys(name), bank.columns[name].bfloat16()) for name in ("visual", "audio"))


def test_gram_matrices_of_the_categories_stay_exact():
    bank = filled_bank(50, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(50, (12,), generator=generator)
        probs = torch.rand(12, 2, 3, generator=generator)
        bank.update(global_batch_of(ids, unit(12, 4), unit(12, 4)), torch.ones(12), probs)
    stored = bank.columns["categories"].double()
    visual, audio = stored.unbind(1)
    assert torch.equal(bank.assignments.gram, torch.stack([visual.T @ visual, visual.T @ audio, audio.T @ audio]))
    gram, count = bank.assignments.gram_matrices()
    torch.testing.assert_close(gram[1].double(), visual.T @ audio / 127**2, rtol=1e-6, atol=1e-6)
    assert count == int(stored.flatten(1).any(1).sum())


def test_initial_rows_are_random_directions_without_a_pair_similarity():
    bank = Bank(4000, 32, 0.5, CPU)
    for name in ("visual", "audio"):
        torch.testing.assert_close(bank.columns[name].norm(dim=1), torch.ones(4000))
        assert bank.columns[name].mean(0).abs().max() < 0.02
    assert (bank.columns["visual"] * bank.columns["audio"]).sum(1).mean().abs() < 0.02
    assert torch.isnan(bank.pair_similarity()).all()


def test_a_bank_is_restored_from_ranges_of_ids():
    bank = filled_bank(10, 4)
    bank.update(global_batch_of(torch.arange(4), unit(4, 4), unit(4, 4)), torch.ones(4), torch.rand(4, 2, 3))
    bank.store_column("votes", torch.rand(10, 3))
    state = bank.state()
    parts = [
        {key: (value[low:high] if key != "range" else torch.tensor([low, high, 10])) for key, value in state.items()}
        for low, high in ((0, 3), (3, 7), (7, 10))
    ]
    other = Bank(10, 4, 0.5, CPU, num_categories=3)
    other.restore(parts)
    assert torch.equal(other.assignments.gram, bank.assignments.gram)
    assert other.columns.keys() == bank.columns.keys()
    assert all(torch.equal(other.columns[name], column) for name, column in bank.columns.items())
    with pytest.raises(ValueError, match="lacks 3"):
        Bank(10, 4, 0.5, CPU, num_categories=3).restore(parts[1:])
    with pytest.raises(ValueError, match="has 10 rows; this run has 11 training samples"):
        Bank(11, 4, 0.5, CPU, num_categories=3).restore(parts)


def test_columns_of_phases_are_registered_stored_and_removed():
    bank = filled_bank(10, 4)
    column = bank.register_column("predictions", (2, 3), torch.uint8)
    assert column.shape == (10, 2, 3) and column.dtype is torch.uint8 and not column.any()
    column[4] = 7
    assert torch.equal(bank.register_column("predictions", (2, 3), torch.uint8), column)
    with pytest.raises(ValueError, match=r"'predictions' exists with rows of shape \(2, 3\).*requested: \(3,\)"):
        bank.register_column("predictions", (3,), torch.uint8)
    assert torch.equal(bank.pop_column("predictions"), column) and "predictions" not in bank.columns
    with pytest.raises(ValueError, match="'votes': 9 rows given; this rank owns 10"):
        bank.store_column("votes", torch.zeros(9, 3))


def test_built_in_columns_are_replaced_in_place_and_cannot_be_removed():
    bank = filled_bank(10, 4)
    visual = unit(10, 4, seed=7)
    bank.store_column("visual", visual)
    assert torch.equal(bank.keys("visual"), visual)
    with pytest.raises(ValueError, match="'correspondence' exists with rows of shape.*requested"):
        bank.store_column("correspondence", torch.ones(10, dtype=torch.float64))
    with pytest.raises(ValueError, match="'visual' is built in and cannot be removed"):
        bank.pop_column("visual")


def test_negative_ids_are_uniform_over_all_other_ids():
    sampled = sample_negative_ids(torch.tensor([2]), 50_000, 5, seed=0, step=0)
    fractions = torch.bincount(sampled[0], minlength=5) / 50_000
    torch.testing.assert_close(fractions, torch.tensor([0.25, 0.25, 0, 0.25, 0.25]), atol=0.01, rtol=0)
