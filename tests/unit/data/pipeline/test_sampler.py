import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.pipeline.class_balance import ClassBalance
from distav.data.pipeline.sampler import PADDING, GlobalBatchSampler, local_batches, micro_batch_size, permutation

SIZES = [7, 30, 1, 12, 22]


def test_every_id_occurs_once_per_epoch_and_epochs_differ():
    orders = [permutation(SIZES, 3, epoch, 2) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(72))
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[0], permutation(SIZES, 3, 0, 2))


def test_samples_are_shuffled_within_blocks_of_shards():
    order = permutation([100] * 10, 0, 0, block=2)
    shards_of_blocks = [set(order[start : start + 200] // 100) for start in range(0, 1000, 200)]
    assert all(len(shards) == 2 for shards in shards_of_blocks)
    assert set.union(*shards_of_blocks) == set(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_global_batch_is_the_same_for_any_number_of_ranks(world_size: int):
    sampler = GlobalBatchSampler(SIZES, 1, 2, global_batch=24, accumulation=2)
    for step in (0, 2, 3, 7):
        parts = [sampler.micro_batches(step, rank, world_size) for rank in range(world_size)]
        joined = np.concatenate([parts[rank][micro][0] for micro in range(2) for rank in range(world_size)])
        assert np.array_equal(joined, sampler.batch(step))
        assert all((epochs == step // 3).all() for part in parts for _, epochs in part)


@pytest.mark.parametrize("world_size", range(1, 10))
@pytest.mark.parametrize("num_samples", [1, 8, 50])
def test_single_pass_covers_all_ids_in_the_same_number_of_batches_per_rank(world_size: int, num_samples: int):
    passes = [local_batches(num_samples, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in passes}) == 1
    ids = np.concatenate([np.concatenate(batches) for batches in passes])
    assert np.array_equal(ids[ids != PADDING], np.arange(num_samples))
    assert all(len(batch) == 4 for batches in passes for batch in batches)


def test_indivisible_batch_is_reported_with_valid_sizes():
    assert micro_batch_size(24, 2, 3) == 4
    with pytest.raises(UserError, match=r"optim.global_batch=25 .* multiples of 6, e.g. 24 or 30"):
        micro_batch_size(25, 2, 3)


def long_tailed_classes(num_classes: int = 6, seed: int = 0) -> np.ndarray:
    probs = 1 / np.arange(1, num_classes + 1) ** 1.5
    return np.random.default_rng(seed).choice(num_classes, sum(SIZES), p=probs / probs.sum())


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_classes_are_drawn_with_the_frequencies_of_the_formula(strength: float):
    classes = long_tailed_classes()
    counts = np.bincount(classes)
    expected = counts ** (1 - strength) / (counts ** (1 - strength)).sum() * sum(SIZES)
    balance = ClassBalance(classes, strength)
    np.testing.assert_allclose(np.bincount(classes, balance.rates), expected, rtol=1e-6)
    total = np.zeros(sum(SIZES))
    for epoch in range(300):
        ids = permutation(SIZES, 3, epoch, 2, balance) % sum(SIZES)
        draws = np.bincount(ids, minlength=sum(SIZES))
        assert draws.sum() == len(ids) == sum(SIZES)
        # Systematic sampling rounds the expected numbers of each class and of each sample up or down.
        assert (np.abs(np.bincount(classes, draws) - expected) < 1 + 1e-6).all()
        assert (np.abs(draws - balance.rates) < 1 + 1e-6).all()
        total += draws
    np.testing.assert_allclose(total / 300, balance.rates, atol=5 * 0.5 / 300**0.5)


def test_balanced_draws_stay_in_their_block_of_shards():
    sizes = [100] * 10
    balance = ClassBalance(np.arange(1000) % 50 // 40, 1.0)
    ids = permutation(sizes, 0, 0, 2, balance) % 1000
    boundaries = np.cumsum([int((ids // 100 == shard).sum()) for shard in dict.fromkeys(ids // 100)])
    assert boundaries[-1] == 1000
    first = set(ids[: boundaries[1]] // 100)
    assert len(first) == 2 and not first & set(ids[boundaries[1] :] // 100)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_balanced_batches_depend_on_seed_and_step_alone(world_size: int):
    classes = long_tailed_classes()
    sampler = GlobalBatchSampler(SIZES, 1, 2, 24, 2, ClassBalance(classes, 1.0))
    restarted = GlobalBatchSampler(SIZES, 1, 2, 24, 2, ClassBalance(classes.copy(), 1.0))
    for step in (8, 0, 4):
        parts = [restarted.micro_batches(step, rank, world_size) for rank in range(world_size)]
        rows = [parts[rank][micro] for micro in range(2) for rank in range(world_size)]
        assert np.array_equal(np.concatenate([ids for ids, _ in rows]), sampler.batch(step))
        epochs = np.concatenate([epochs for _, epochs in rows])
        alone = np.concatenate([epochs for _, epochs in sampler.micro_batches(step, 0, 1)])
        assert np.array_equal(epochs, alone)
    other = GlobalBatchSampler(SIZES, 2, 2, 24, 2, ClassBalance(classes, 1.0))
    assert not np.array_equal(sampler.batch(0), other.batch(0)) and not np.array_equal(
        sampler.batch(0), sampler.batch(3)
    )


def test_every_draw_of_a_sample_has_its_own_augmentation():
    sampler = GlobalBatchSampler(SIZES, 1, 2, 24, 1, ClassBalance(long_tailed_classes(), 1.0))
    rows = [sampler.micro_batches(step, 0, 1)[0] for step in range(6)]
    pairs = [pair for ids, epochs in rows for pair in zip(ids.tolist(), epochs.tolist(), strict=True)]
    assert len(set(pairs)) == len(pairs) > len({sample for sample, _ in pairs[:72]})


def test_balanced_sampling_of_equal_classes_draws_every_sample_once():
    balance = ClassBalance(np.arange(72) % 6, 1.0)
    assert sorted(permutation(SIZES, 3, 0, 2, balance)) == list(range(72))
