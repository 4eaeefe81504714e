"""Order of samples: a pure function of (shard sizes, seed, epoch, class balance), divided among ranks at the end.

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
from distav.data.pipeline.class_balance import ClassBalance

Ids = NDArray[np.int64]
PADDING = -1
"""Id of a row without a sample in an incomplete batch; such rows are masked."""
_REPEAT_STRIDE = 2**32
"""Distance of the augmentation epochs of two draws of a sample in one epoch."""


def permutation(
    shard_sizes: Sequence[int], seed: int, epoch: int, block: int, balance: ClassBalance | None = None
) -> Ids:
    """Return the draws of one epoch in order.

    Shards are shuffled and grouped into blocks, and the samples of each block are shuffled, so that consecutive reads
    access few files.

    Args:
        shard_sizes: samples of each shard; ids are consecutive across shards.
        seed: seed of the run.
        epoch: number of the epoch.
        block: shards per block.
        balance: number of draws of each sample; None: every sample once.

    Returns:
        [N] int64. Draw d is draw number d // N, from 0, of the sample with id d % N; without `balance`, the draws are
        the ids from 0 to N-1.
    """
    rng = np.random.default_rng([seed, 4, epoch])
    ends: list[int] = [0, *accumulate(shard_sizes)]
    shards: list[int] = rng.permutation(len(shard_sizes)).tolist()
    counts = balance.draw(np.random.default_rng([seed, 6, epoch])) if balance else None
    blocks: list[Ids] = []
    for start in range(0, len(shards), block):
        members: list[Ids] = [np.arange(ends[shard], ends[shard + 1]) for shard in shards[start : start + block]]
        draws = np.concatenate(members)
        blocks.append(rng.permutation(draws if counts is None else _repeated(draws, counts[draws], ends[-1])))
    return np.concatenate(blocks).astype(np.int64) if blocks else np.zeros(0, np.int64)


def _repeated(ids: Ids, counts: Ids, num_samples: int) -> Ids:
    """Return the draws of samples: [m] ids drawn [m] times."""
    starts: Ids = np.cumsum(counts) - counts
    repeats: Ids = np.arange(int(counts.sum())) - np.repeat(starts, counts)
    return np.repeat(ids, counts) + num_samples * repeats


@lru_cache(maxsize=4)
def _cached_permutation(
    shard_sizes: tuple[int, ...], seed: int, epoch: int, block: int, balance: ClassBalance | None
) -> Ids:
    """Return a permutation from the cache, because every step of an epoch uses the same one."""
    return permutation(shard_sizes, seed, epoch, block, balance)


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Unlimited global batches for training: epochs of complete batches; the remainder of an epoch is dropped.

    Attributes:
        shard_sizes: samples of each shard.
        seed: seed of the run.
        block: shards that are shuffled together.
        global_batch: samples of an optimizer step over all ranks.
        accumulation: micro-batches per optimizer step.
        balance: number of draws of each sample in an epoch; None: every sample once.
    """

    shard_sizes: Sequence[int]
    seed: int
    block: int
    global_batch: int
    accumulation: int
    balance: ClassBalance | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return sum(self.shard_sizes) // self.global_batch

    def batch(self, step: int) -> Ids:
        """Return the ids of one optimizer step over all ranks and micro-batches, [global_batch]."""
        return self._draws(step) % sum(self.shard_sizes)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[tuple[Ids, Ids]]:
        """Return the rows of one rank in one optimizer step, one (ids, epochs) per micro-batch.

        Epochs are those of the random transforms. Each draw of a sample in an epoch has its own one, so that repeated
        samples are augmented differently.
        """
        epoch, num_samples = step // self.steps_per_epoch, sum(self.shard_sizes)
        draws = self._draws(step).reshape(self.accumulation, world_size, -1)[:, rank]
        return [(rows % num_samples, epoch + rows // num_samples * _REPEAT_STRIDE) for rows in draws]

    def _draws(self, step: int) -> Ids:
        """Return the draws of one optimizer step, [global_batch]; see `permutation`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _cached_permutation(tuple(self.shard_sizes), self.seed, epoch, self.block, self.balance)
        return order[position * self.global_batch : (position + 1) * self.global_batch]


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
