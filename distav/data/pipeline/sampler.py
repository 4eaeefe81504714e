"""Order of samples: a pure function of (shard sizes, seed, epoch), divided among ranks at the end.

A global batch is a slice of the epoch's permutation, and a rank takes its part of the slice. The sequence of samples is
therefore the same for any number of ranks and restarts, and the step alone determines the position of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from distav.config.errors import UserError

Ids = NDArray[np.int64]
PADDING = -1
"""Id of a row without a sample in an incomplete batch; such rows are masked."""


def permutation(shard_sizes: Sequence[int], seed: int, epoch: int, block: int) -> Ids:
    """Return all ids in the order of one epoch.

    Shards are shuffled and grouped into blocks, and the samples of each block are shuffled, so that consecutive reads
    access few files.

    Args:
        shard_sizes: samples of each shard; ids are consecutive across shards.
        seed: seed of the run.
        epoch: number of the epoch.
        block: shards per block.

    Returns:
        [N] int64, every id from 0 to N-1 once.
    """
    rng = np.random.default_rng([seed, 4, epoch])
    ends: list[int] = [0, *accumulate(shard_sizes)]
    shards: list[int] = rng.permutation(len(shard_sizes)).tolist()
    blocks: list[Ids] = []
    for start in range(0, len(shards), block):
        members: list[Ids] = [np.arange(ends[shard], ends[shard + 1]) for shard in shards[start : start + block]]
        blocks.append(rng.permutation(np.concatenate(members)))
    return np.concatenate(blocks).astype(np.int64) if blocks else np.zeros(0, np.int64)


@lru_cache(maxsize=4)
def _cached_permutation(shard_sizes: tuple[int, ...], seed: int, epoch: int, block: int) -> Ids:
    """Return a permutation from the cache, because every step of an epoch uses the same one."""
    return permutation(shard_sizes, seed, epoch, block)


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Unlimited global batches for training: epochs of complete batches; the remainder of an epoch is dropped.

    Attributes:
        shard_sizes: samples of each shard.
        seed: seed of the run.
        block: shards that are shuffled together.
        global_batch: samples of an optimizer step over all ranks.
        accumulation: micro-batches per optimizer step.
    """

    shard_sizes: Sequence[int]
    seed: int
    block: int
    global_batch: int
    accumulation: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return sum(self.shard_sizes) // self.global_batch

    def batch(self, step: int) -> Ids:
        """Return the ids of one optimizer step over all ranks and micro-batches, [global_batch]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _cached_permutation(tuple(self.shard_sizes), self.seed, epoch, self.block)
        return order[position * self.global_batch : (position + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Ids]:
        """Return the ids of one rank in one optimizer step, one array per micro-batch."""
        micro_batches = self.batch(step).reshape(self.accumulation, world_size, -1)
        return [micro_batches[number, rank] for number in range(self.accumulation)]


def micro_batch_size(global_batch: int, accumulation: int, world_size: int) -> int:
    """Return the size of a rank's micro-batch.

    Raises:
        UserError: if ranks and accumulation steps do not divide the global batch; gives the nearest valid sizes.
    """
    parts = accumulation * world_size
    if global_batch % parts:
        below = max(parts, global_batch // parts * parts)
        raise UserError(
            f"optim.global_batch={global_batch} cannot be divided among {world_size} ranks with "
            f"optim.gradient_accumulation_steps={accumulation}; allowed: multiples of {parts}, e.g. {below} or "
            f"{below + parts}."
        )
    return global_batch // parts


def local_batches(num_samples: int, batch: int, rank: int, world_size: int) -> list[Ids]:
    """Return a rank's batches of one pass over its ids, all of the same length, filled with PADDING.

    Every rank gets the same number of batches, so that collectives in the pass cannot deadlock.
    """
    start, end = num_samples * rank // world_size, num_samples * (rank + 1) // world_size
    largest = -(-num_samples // world_size)
    return padded_batches(np.arange(start, end), batch, -(-largest // batch))


def padded_batches(ids: Ids, batch: int, count: int) -> list[Ids]:
    """Divide ids into `count` batches of the same length, filled with PADDING."""
    padded = np.full(count * batch, PADDING, dtype=np.int64)
    padded[: len(ids)] = ids
    return list(padded.reshape(-1, batch))
