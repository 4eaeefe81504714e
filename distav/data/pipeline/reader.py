"""Reads the members of samples from shards by byte range and verifies them by CRC-32."""

import os
from functools import cached_property

import numpy as np
from isal.isal_zlib import crc32  # Three times as fast as zlib's.

from distav.data.dataset import Split
from distav.data.storage import parts
from distav.data.storage.errors import StorageError
from distav.data.storage.object_store import ObjectStore
from distav.data.storage.parts import PartLayout
from distav.data.storage.prefetch import PartPrefetcher

_MAX_OVERHEAD = 1 << 20
"""Limit on the other bytes of a remote sample that are read along with its members: tar headers and its JSON."""
Members = dict[str, bytes]
"""Members of a sample by name, as stored."""


class DecodeError(Exception):
    """A sample or batch cannot be decoded; the message gives the reason."""


class CorruptSampleError(Exception):
    """A sample cannot be used; the message gives the reason."""


class _ChecksumError(CorruptSampleError):
    """A member differs from what was written."""


class ShardReader:
    """Reads the samples of a split in any order; keeps shard files open.

    Attributes:
        split: the split.
        layout: parts of the shards of a remote split with a cache; otherwise None.
    """

    def __init__(self, split: Split):
        self.split = split
        self.layout = None
        if split.remote and split.remote.cache.max_bytes:
            names, sizes = [path.name for path in split.shards], np.array(split.shard_bytes, np.int64)
            self.layout = PartLayout(names, sizes, parts.PART_BYTES)
        self._files: dict[int, int] = {}

    def close(self) -> None:
        """Close the shard files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    @cached_property
    def ranges(self) -> np.ndarray:
        """First byte of each sample's members in its shard, and the byte after the last one: [N, 2] int64.

        Both are 0 for a sample without members, or whose members are outside the shard or too far apart.
        """
        columns, names = self.split.columns, list(self.split.members)
        offsets, sizes = (np.stack([columns[f"{name}_{column}"] for name in names]) for column in ("offset", "bytes"))
        present = sizes > 0
        starts = np.where(present, offsets, np.iinfo(np.int64).max).min(0)
        ends = np.where(present, offsets + sizes, 0).max(0)
        limits = np.array(self.split.shard_bytes, np.int64)[columns["shard"]]
        valid = (starts >= 0) & (ends <= limits) & (ends - starts <= sizes.sum(0) + _MAX_OVERHEAD) & present.any(0)
        return np.where(valid, np.stack([starts, ends]), 0).T

    def read(self, sample: int, prefetcher: PartPrefetcher | None = None) -> Members:
        """Return all members that a sample has.

        Args:
            sample: its id.
            prefetcher: downloads the parts of a remote split ahead; the sample has to be one of its wanted ranges.

        Raises:
            CorruptSampleError: if a member cannot be read, is truncated, or its CRC-32 differs.
        """
        return self._read(sample, self._existing(sample), prefetcher)

    def member(self, sample: int, name: str) -> bytes:
        """Return one member of a sample, empty if the sample lacks it; raises CorruptSampleError as `read` does."""
        if name not in self._existing(sample):
            return b""
        return self._read(sample, [name])[name]

    def _existing(self, sample: int) -> list[str]:
        return [name for name in self.split.members if self.split.columns[f"{name}_bytes"][sample]]

    def _read(self, sample: int, names: list[str], prefetcher: PartPrefetcher | None = None) -> Members:
        if self.split.remote:
            return self._read_remote(self.split.remote, sample, names, prefetcher)
        return {name: self._read_local(sample, name) for name in names}

    def _read_remote(
        self, remote: ObjectStore, sample: int, names: list[str], prefetcher: PartPrefetcher | None
    ) -> Members:
        """Read members from cached parts or with one request, which is repeated if cached bytes are corrupt."""
        number, (start, end) = int(self.split.columns["shard"][sample]), self.ranges[sample].tolist()
        shard = self.split.shards[number].name
        if not end:
            raise CorruptSampleError(f"members are outside {shard}, or too far apart in it")

        def verify(content: bytes) -> Members:
            view, members = memoryview(content), {}
            for name in names:
                offset, size = (int(self.split.columns[f"{name}_{column}"][sample]) for column in ("offset", "bytes"))
                members[name] = self._verify(bytes(view[offset - start :][:size]), sample, name, shard)
            return members

        def request(bypass_cache: bool) -> Members:
            try:
                return verify(remote.read(shard, start, end - start, bypass_cache))
            except StorageError as error:
                raise CorruptSampleError(error.reason) from None

        content = prefetcher.read(number, start, end) if prefetcher else None
        if content is None and self.layout:
            content = self.layout.read_cached(remote.cache, number, start, end)
        try:
            return request(bypass_cache=False) if content is None else verify(content)
        except _ChecksumError:
            members = request(bypass_cache=True)
            if content is not None and self.layout:
                self.layout.drop_cached(remote.cache, number, start, end)
            return members

    def _read_local(self, sample: int, name: str) -> bytes:
        columns = self.split.columns
        shard = int(columns["shard"][sample])
        path = self.split.shards[shard]
        size = int(columns[f"{name}_bytes"][sample])
        try:
            if shard not in self._files:
                self._files[shard] = os.open(path, os.O_RDONLY)
            content = os.pread(self._files[shard], size, int(columns[f"{name}_offset"][sample]))
        except OSError as error:
            raise CorruptSampleError(f"{name} cannot be read from {path.name}: {error.strerror}") from None
        return self._verify(content, sample, name, path.name)

    def _verify(self, content: bytes, sample: int, name: str, shard: str) -> bytes:
        """Return the content of a member if its size and CRC-32 are those in the index."""
        size = int(self.split.columns[f"{name}_bytes"][sample])
        if len(content) != size:
            raise _ChecksumError(f"{name} truncated in {shard}: {len(content)} of {size} bytes")
        if crc32(content) != int(self.split.columns[f"{name}_crc32"][sample]):
            raise _ChecksumError(f"{name} altered in {shard}: CRC-32 differs")
        return content
