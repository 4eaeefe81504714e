"""Reading of a remote split in the order of a plan: parts of shards and then batches are requested in advance.

Legend: n samples.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from distav.data.pipeline.reader import Members, ShardReader
from distav.data.pipeline.sampler import PADDING, Ids
from distav.data.storage.parts import Array
from distav.data.storage.prefetch import PartPrefetcher
from distav.distributed.collectives import get_world_size
from distav.distributed.launch import Launch

Step = tuple[Ids, int | Ids]
"""Ids of a batch and their epochs."""
MAX_PLANNED = 1 << 18
"""Limit on the samples that are planned; they decide which parts are worth a download."""
_MAX_CHUNK = 4096
"""Limit on the samples that are announced at once."""


def read_ahead(
    plan: Iterable[Step],
    reader: ShardReader,
    pool: ThreadPoolExecutor,
    read: Callable[[int, PartPrefetcher | None], Members | None],
    num_batches: int,
    block_shards: int,
) -> Iterator[tuple[Ids, int | Ids, Iterator[Members | None]]]:
    """Yield each step of a plan with the members of its samples.

    Args:
        plan: ids and epochs of each batch.
        reader: reader of the split.
        pool: threads that read samples.
        read: reads a sample, given its id and the prefetcher; None without a cache that can be written.
        num_batches: batches that are requested in advance.
        block_shards: shards that are shuffled together.
    """
    prefetcher = _open_prefetcher(reader)
    steps = plan
    if prefetcher:
        steps = PlanWindow(plan, reader, prefetcher, _block_samples(reader, block_shards))

    def read_once(sample: int) -> Members | None:
        try:
            return read(sample, prefetcher)
        finally:
            if prefetcher and sample != PADDING and (end := int(reader.ranges[sample, 1])):
                shard, start = int(reader.split.columns["shard"][sample]), int(reader.ranges[sample, 0])
                prefetcher.done(shard, start, end)

    requested: deque[tuple[Ids, int | Ids, Iterator[Members | None]]] = deque()
    try:
        for ids, epoch in steps:
            requested.append((ids, epoch, pool.map(read_once, ids.tolist())))
            if len(requested) > num_batches:
                yield requested.popleft()
        yield from requested
    finally:
        if prefetcher:
            prefetcher.close()


def _open_prefetcher(reader: ShardReader) -> PartPrefetcher | None:
    remote, layout = reader.split.remote, reader.layout
    if not remote or not layout:
        return None
    try:
        return PartPrefetcher(remote, layout, Launch.from_environment().local_size)
    except OSError as error:
        remote.cache.warn(error)
        return None


def _block_samples(reader: ShardReader, block_shards: int) -> int:
    """Return about how many samples of a shuffle block one rank reads."""
    num_shards = len(reader.split.shards)
    return max(1, len(reader.split) * min(block_shards, num_shards) // (num_shards * get_world_size()))


@dataclass
class _Chunk:
    """Consecutive steps of a plan.

    Attributes:
        steps: ids and epochs of each batch.
        size: number of ids.
        ranges: shards, first bytes and ends of the samples, [n] each.
    """

    steps: list[Step]
    size: int
    ranges: tuple[Array, Array, Array]


class PlanWindow:
    """Passes on a plan, and announces its samples to a prefetcher.

    The next `horizon` samples are wanted. Up to `MAX_PLANNED` samples are planned, but no more than share the parts
    that fit in the cache, since a part that is downloaded twice has to be worth it twice.

    Args:
        plan: ids and epochs of each batch.
        reader: reader of the split.
        prefetcher: prefetcher of the split.
        horizon: number of samples.
    """

    def __init__(self, plan: Iterable[Step], reader: ShardReader, prefetcher: PartPrefetcher, horizon: int):
        self._plan, self._reader, self._prefetcher, self.horizon = iter(plan), reader, prefetcher, horizon
        self._planned: deque[_Chunk] = deque()
        self._wanted: deque[Step] = deque()
        self._num_planned = self._num_wanted = 0

    def __iter__(self) -> Iterator[Step]:
        while True:
            self._extend()
            if not self._wanted:
                return
            step = self._wanted.popleft()
            self._num_wanted -= len(step[0])
            yield step

    def _extend(self) -> None:
        """Plan and want more samples after some have been passed on."""
        while self._has_room() and (chunk := self._next_chunk()):
            self._prefetcher.plan(*chunk.ranges)
            self._planned.append(chunk)
            self._num_planned += chunk.size
        while self._planned and self._num_wanted < self.horizon:
            chunk = self._planned.popleft()
            self._prefetcher.want(*chunk.ranges)
            self._wanted += chunk.steps
            self._num_planned -= chunk.size
            self._num_wanted += chunk.size

    def _has_room(self) -> bool:
        ahead, prefetcher = self._num_planned + self._num_wanted, self._prefetcher
        fits = prefetcher.planned_part_bytes <= prefetcher.store.cache.max_bytes
        return ahead < self.horizon or (ahead < MAX_PLANNED and fits)

    def _next_chunk(self) -> _Chunk | None:
        """Return the next steps of the plan; None at its end."""
        steps: list[Step] = []
        size = 0
        while size < min(_MAX_CHUNK, self.horizon) and (step := next(self._plan, None)):
            steps.append(step)
            size += len(step[0])
        if not steps:
            return None
        ids = np.concatenate([step[0] for step in steps])
        ids = ids[ids != PADDING]
        starts, ends = self._reader.ranges[ids].T
        valid = ends > 0
        shards = self._reader.split.columns["shard"][ids].astype(np.int64)
        return _Chunk(steps, size, (shards[valid], starts[valid], ends[valid]))
