"""Members of samples, read from shards by byte range and checked by CRC-32."""

import os

from isal.isal_zlib import crc32  # three times as fast as zlib's

from distav.data.dataset import Split
from distav.data.storage.object_store import ObjectStore, StorageError

_MOST_BETWEEN = 1 << 20
"""Most bytes of a remote sample that are read along with its members: headers, and its JSON."""
Members = dict[str, bytes]
"""The members of one sample by name, as read."""


class DecodeError(Exception):
    """A batch could not be decoded."""


class CorruptSampleError(Exception):
    """A sample that cannot be used, with the reason."""


class _ChecksumError(CorruptSampleError):
    """A member is not what was written."""


class ShardReader:
    """Reads any sample of one split in any order; files stay open."""

    def __init__(self, split: Split):
        self.split = split
        self._files: dict[int, int] = {}

    def close(self) -> None:
        """Close the shard files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, sample: int) -> Members:
        """Return the members of a sample.

        Raises:
            BadSample: where a member cannot be read, is cut short, or has another CRC-32 than when it was written.
        """
        return self._of(sample, list(self.split.members))

    def member(self, sample: int, name: str) -> bytes:
        """Return one member of a sample, or raise BadSample as `read` does."""
        return self._of(sample, [name])[name]

    def _of(self, sample: int, kinds: list[str]) -> Members:
        if self.split.remote:
            return self._from_afar(self.split.remote, sample, kinds)
        return {kind: self._here(sample, kind) for kind in kinds}

    def _from_afar(self, remote: ObjectStore, sample: int, kinds: list[str]) -> Members:
        """Read members of a sample; all of them lie together and come in one piece."""
        columns, every = self.split.columns, self.split.members
        shard = self.split.shards[int(columns["shard"][sample])].name
        places = {kind: [int(columns[f"{kind}_{what}"][sample]) for what in ("offset", "bytes")] for kind in every}
        start, end = min(offset for offset, _ in places.values()), max(map(sum, places.values()))
        if start < 0 or end - start > sum(size for _, size in places.values()) + _MOST_BETWEEN:
            raise CorruptSampleError(f"members do not lie together in {shard}")

        def members(afresh: bool) -> Members:
            try:
                content = memoryview(remote.read(shard, start, end - start, afresh))
            except StorageError as fault:
                raise CorruptSampleError(fault.reason) from None
            parts = {kind: bytes(content[places[kind][0] - start :][: places[kind][1]]) for kind in kinds}
            return {kind: self._sound(part, sample, kind, shard) for kind, part in parts.items()}

        try:
            return members(afresh=False)
        except _ChecksumError:
            return members(afresh=True)

    def _here(self, sample: int, kind: str) -> bytes:
        columns = self.split.columns
        shard = int(columns["shard"][sample])
        path = self.split.shards[shard]
        size = int(columns[f"{kind}_bytes"][sample])
        try:
            if shard not in self._files:
                self._files[shard] = os.open(path, os.O_RDONLY)
            content = os.pread(self._files[shard], size, int(columns[f"{kind}_offset"][sample]))
        except OSError as error:
            raise CorruptSampleError(f"{kind} unreadable in {path.name}: {error.strerror}") from None
        return self._sound(content, sample, kind, path.name)

    def _sound(self, content: bytes, sample: int, kind: str, shard: str) -> bytes:
        """Return a member's content if it is what was written."""
        size = int(self.split.columns[f"{kind}_bytes"][sample])
        if len(content) != size:
            raise _ChecksumError(f"{kind} truncated in {shard}: {len(content)} of {size} bytes")
        if crc32(content) != int(self.split.columns[f"{kind}_crc32"][sample]):
            raise _ChecksumError(f"{kind} altered in {shard}: CRC-32 differs")
        return content
