"""Parts: ranges of equal size into which a shard is divided for downloading.

Legend: S shards, P parts of all shards, n ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distav.data.storage.cache import Cache

PART_BYTES = 16 << 20
"""Largest size of a part."""
Array = NDArray[np.int64]


@dataclass(frozen=True)
class PartLayout:
    """The parts of all shards of a split, numbered in the order of the shards.

    Attributes:
        shards: names of the shards.
        shard_bytes: [S] their sizes.
        max_bytes: largest size of a part.
    """

    shards: Sequence[str]
    shard_bytes: Array
    max_bytes: int

    @cached_property
    def step(self) -> Array:
        """Size of the parts of each shard, of which the last one may be smaller: [S]."""
        counts = np.maximum(1, -(-self.shard_bytes // self.max_bytes))
        return np.maximum(1, -(-self.shard_bytes // counts))

    @cached_property
    def first(self) -> Array:
        """First part of each shard, and the number of all parts: [S + 1]."""
        return np.concatenate([[0], np.cumsum(-(-self.shard_bytes // self.step))]).astype(np.int64)

    @cached_property
    def shard(self) -> Array:
        """Shard of each part: [P]."""
        return np.repeat(np.arange(len(self.shards)), np.diff(self.first))

    @cached_property
    def start(self) -> Array:
        """First byte of each part within its shard: [P]."""
        return (np.arange(self.first[-1]) - self.first[self.shard]) * self.step[self.shard]

    @cached_property
    def end(self) -> Array:
        """Byte after the last one of each part: [P]."""
        return np.minimum(self.start + self.step[self.shard], self.shard_bytes[self.shard])

    @cached_property
    def size(self) -> Array:
        """Bytes of each part: [P]."""
        return self.end - self.start

    def of_ranges(self, shards: Array, starts: Array, ends: Array) -> tuple[Array, Array]:
        """Return the parts that byte ranges of shards overlap.

        Args:
            shards: [n] shard of each range.
            starts, ends: [n] first byte of each range, and the byte after its last one.

        Returns:
            The parts in the order of the ranges, and the overlapping bytes, both [m] with m >= n.
        """
        begin = self.first[shards] + starts // self.step[shards]
        counts = self.first[shards] + (ends - 1) // self.step[shards] - begin + 1
        owner = np.repeat(np.arange(len(shards)), counts)
        parts = begin[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return parts, np.minimum(ends[owner], self.end[parts]) - np.maximum(starts[owner], self.start[parts])

    def of_range(self, shard: int, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the parts that one byte range overlaps, each with the first overlapping byte and the end."""
        first, step = int(self.first[shard]), int(self.step[shard])
        numbers = range(start // step, (end - 1) // step + 1)
        return [(first + number, max(start, number * step), min(end, (number + 1) * step)) for number in numbers]

    def name(self, part: int) -> str:
        """Return the name of a part in the cache, which is that of its range."""
        return f"{self.shards[self.shard[part]]}/{self.start[part]}-{self.size[part]}"

    def is_cached(self, cache: Cache, part: int) -> bool:
        """Return whether a part is cached with its size."""
        return cache.contains(self.name(part), int(self.size[part]))

    def read_cached(self, cache: Cache, shard: int, start: int, end: int) -> bytes | None:
        """Return a byte range of a shard from the cache; None if a part of it is not cached."""
        pieces: list[bytes] = []
        for part, begin, stop in self.of_range(shard, start, end):
            piece = cache.read(self.name(part), begin - int(self.start[part]), stop - begin)
            if piece is None:
                return None
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def drop_cached(self, cache: Cache, shard: int, start: int, end: int) -> None:
        """Remove the parts of a byte range from the cache, because they are corrupt."""
        for part, _, _ in self.of_range(shard, start, end):
            cache.drop(self.name(part))
