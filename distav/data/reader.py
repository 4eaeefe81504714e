"""Members of samples, read from shards by byte range and checked by CRC-32."""

import os

from isal.isal_zlib import crc32  # three times as fast as zlib's

from distav.data.format import Split

Members = dict[str, bytes]
"""The members of one sample by name, as read."""


class DecodeError(Exception):
    """A batch could not be decoded."""


class BadSample(Exception):
    """A sample that cannot be used, with the reason."""


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
        return {name: self.member(sample, name) for name in self.split.members}

    def member(self, sample: int, kind: str) -> bytes:
        """Return one member of a sample, or raise BadSample as `read` does."""
        columns = self.split.columns
        shard = int(columns["shard"][sample])
        path = self.split.shards[shard]
        size = int(columns[f"{kind}_bytes"][sample])
        try:
            if shard not in self._files:
                self._files[shard] = os.open(path, os.O_RDONLY)
            content = os.pread(self._files[shard], size, int(columns[f"{kind}_offset"][sample]))
        except OSError as error:
            raise BadSample(f"{kind} unreadable in {path.name}: {error.strerror}") from None
        if len(content) != size:
            raise BadSample(f"{kind} truncated in {path.name}: {len(content)} of {size} bytes")
        if crc32(content) != int(columns[f"{kind}_crc32"][sample]):
            raise BadSample(f"{kind} altered in {path.name}: CRC-32 differs")
        return content
