import numpy as np
import pytest

from distav.config.errors import UserError
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
        joined = np.concatenate([parts[rank][micro] for micro in range(2) for rank in range(world_size)])
        assert np.array_equal(joined, sampler.batch(step))


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
