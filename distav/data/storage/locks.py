"""Locks by name that the processes of one machine share."""

import errno
import fcntl
import hashlib
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("@hhqqi4x")
"""`struct flock` of Linux: type, origin, start, length, process."""


class NamedLocks:
    """Shared and exclusive locks; the kernel releases those of a process that ends.

    Each name stands for one byte of a file that stays empty. The locks belong to this object, not to its process, so
    that two objects in one process exclude each other.

    Args:
        path: the file; created if necessary.

    Raises:
        OSError: if the file cannot be created, or its file system has no locks.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.share("")
            self.release("")
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Release all locks."""
        os.close(self._descriptor)

    def share(self, name: str) -> None:
        """Acquire a shared lock; waits while another object holds the exclusive one."""
        self._request(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, name)

    def try_acquire(self, name: str) -> bool:
        """Acquire an exclusive lock; returns False if another object holds the lock."""
        try:
            self._request(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, name)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def release(self, name: str) -> None:
        """Release a lock."""
        self._request(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, name)

    def _request(self, command: int, kind: int, name: str) -> None:
        position = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 2
        fcntl.fcntl(self._descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, position, 1, 0))
