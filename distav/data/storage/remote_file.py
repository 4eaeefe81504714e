"""Files at a path or a URL, opened for reading."""

import io
from typing import Any, BinaryIO

from distav.data.storage.object_store import RemoteDirectory, is_url

REQUEST_BYTES = 1 << 18
"""Bytes of a request for a small part of a remote file."""


def open_file(location: str) -> BinaryIO:
    """Open a file at a path or URL.

    Raises:
        OSError: if a local file cannot be opened.
        StorageError: if a remote file cannot be read; reading raises it too.
    """
    if not is_url(location):
        return open(location, "rb")
    directory, _, name = location.rpartition("/")
    return io.BufferedReader(_RemoteFile(RemoteDirectory(directory), name), REQUEST_BYTES)


class _RemoteFile(io.RawIOBase):
    """A remote file that is read by byte ranges."""

    def __init__(self, directory: RemoteDirectory, name: str):
        self.directory, self.name = directory, name
        self.size, self.position = directory.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.position))
        buffer[:count] = self.directory.read_range(self.name, self.position, count)
        self.position += count
        return count
