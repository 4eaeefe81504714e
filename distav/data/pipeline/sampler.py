"""The order of samples: a pure function of (sizes, seed, epoch), cut by rank only at the end.

A global batch is a slice of the epoch's permutation and a rank takes its part of the slice, so the stream of samples
is the same for any number of ranks or restarts, and where a run stands is told by its step alone.
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
"""Stands where a last batch has no sample; such rows are masked."""


def permutation(shard_sizes: Sequence[int], seed: int, epoch: int, block: int) -> Ids:
    """Return all ids in the order of one epoch.

    Shards are shuffled, `block` of them at a time are put together, and the samples of each block are shuffled, so
    that reads stay inside a few files.

    Args:
        shard_sizes: samples of each shard; ids run on from shard to shard.
        seed: seed of the run.
        epoch: number of the epoch.
        block: shards shuffled together.

    Returns:
        [N] int64, every id from 0 to N-1 once.
    """
    rng = np.random.default_rng([seed, 4, epoch])
    ends: list[int] = [0, *accumulate(shard_sizes)]
    shards: list[int] = rng.permutation(len(shard_sizes)).tolist()
    parts: list[Ids] = []
    for start in range(0, len(shards), block):
        members: list[Ids] = [np.arange(ends[shard], ends[shard + 1]) for shard in shards[start : start + block]]
        parts.append(rng.permutation(np.concatenate(members)))
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


@lru_cache(maxsize=4)
def _permutation(shard_sizes: tuple[int, ...], seed: int, epoch: int, block: int) -> Ids:
    """Remember the last few permutations, since every step of an epoch asks for the same one."""
    return permutation(shard_sizes, seed, epoch, block)


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Endless training batches: epochs of whole global batches, a remainder is left for other epochs."""

    shard_sizes: Sequence[int]
    seed: int
    block: int
    global_batch: int
    accumulation: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return sum(self.shard_sizes) // self.global_batch

    def batch(self, step: int) -> Ids:
        """Return the ids of one optimiser step over all ranks and micro-batches, [global_batch]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(tuple(self.shard_sizes), self.seed, epoch, self.block)
        return order[place * self.global_batch : (place + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Ids]:
        """Return one rank's ids of one step, a list of `accumulation` arrays."""
        micro = self.batch(step).reshape(self.accumulation, world_size, -1)
        return [micro[number, rank] for number in range(self.accumulation)]


def micro_batch_size(global_batch: int, accumulation: int, world_size: int) -> int:
    """Return the micro-batch of one rank.

    Raises:
        UserError: where ranks and accumulation do not divide the global batch; names the nearest that they do.
    """
    parts = accumulation * world_size
    if global_batch % parts:
        below = max(parts, global_batch // parts * parts)
        raise UserError(
            f"optim.global_batch={global_batch} cannot be divided among {world_size} ranks with "
            f"optim.gradient_accumulation_steps={accumulation}; allowed: multiples of {parts}, e.g. {below} or {below + parts}."
        )
    return global_batch // parts


def local_batches(num_samples: int, batch: int, rank: int, world_size: int) -> list[Ids]:
    """Return one rank's batches of a single pass over the ids that it owns, all of one length, filled with PADDING.

    Every rank gets the same number of batches, so that collectives inside the pass cannot wait for ever.
    """
    low, high = num_samples * rank // world_size, num_samples * (rank + 1) // world_size
    most = -(-num_samples // world_size)
    return padded_batches(np.arange(low, high), batch, -(-most // batch))


def padded_batches(ids: Ids, batch: int, count: int) -> list[Ids]:
    """Cut ids into `count` batches of one length, filled with PADDING."""
    padded = np.full(count * batch, PADDING, dtype=np.int64)
    padded[: len(ids)] = ids
    return list(padded.reshape(-1, batch))
