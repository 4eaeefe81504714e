"""Reads the members of samples from shards by byte range and verifies them by CRC-32."""

import os

from isal.isal_zlib import crc32  # Three times as fast as zlib's.

from distav.data.dataset import Split
from distav.data.storage.errors import StorageError
from distav.data.storage.object_store import ObjectStore

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
    """Reads the samples of a split in any order; keeps shard files open."""

    def __init__(self, split: Split):
        self.split = split
        self._files: dict[int, int] = {}

    def close(self) -> None:
        """Close the shard files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, sample: int) -> Members:
        """Return all members that a sample has.

        Raises:
            CorruptSampleError: if a member cannot be read, is truncated, or its CRC-32 differs.
        """
        return self._read(sample, self._existing(sample))

    def member(self, sample: int, name: str) -> bytes:
        """Return one member of a sample, empty if the sample lacks it; raises CorruptSampleError as `read` does."""
        if name not in self._existing(sample):
            return b""
        return self._read(sample, [name])[name]

    def _existing(self, sample: int) -> list[str]:
        return [name for name in self.split.members if self.split.columns[f"{name}_bytes"][sample]]

    def _read(self, sample: int, names: list[str]) -> Members:
        if self.split.remote:
            return self._read_remote(self.split.remote, sample, names)
        return {name: self._read_local(sample, name) for name in names}

    def _read_remote(self, remote: ObjectStore, sample: int, names: list[str]) -> Members:
        """Read members with one request for the byte range of the sample; repeat it if cached bytes are corrupt."""
        columns = self.split.columns
        shard = self.split.shards[int(columns["shard"][sample])].name
        ranges = {
            name: (int(columns[f"{name}_offset"][sample]), int(columns[f"{name}_bytes"][sample]))
            for name in self._existing(sample)
        }
        start = min(offset for offset, _ in ranges.values())
        end = max(offset + size for offset, size in ranges.values())
        if start < 0 or end - start > sum(size for _, size in ranges.values()) + _MAX_OVERHEAD:
            raise CorruptSampleError(f"members are too far apart in {shard}")

        def read(bypass_cache: bool) -> Members:
            try:
                content = memoryview(remote.read(shard, start, end - start, bypass_cache))
            except StorageError as error:
                raise CorruptSampleError(error.reason) from None
            members = {}
            for name in names:
                offset, size = ranges[name]
                members[name] = self._verify(bytes(content[offset - start :][:size]), sample, name, shard)
            return members

        try:
            return read(bypass_cache=False)
        except _ChecksumError:
            return read(bypass_cache=True)

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
