"""Local cache of byte ranges of remote datasets: a directory of limited size, shared by any number of processes.

Every cached file can be fetched again, and its reader verifies it.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distav.data.storage.locks import NamedLocks

LOCKS = "locks"
"""File of a dataset's named locks; a shared lock by the name of a shard protects the ranges of the shard."""
_ABANDONED_S = 3600.0
"""Age from which a temporary file is regarded as abandoned by its writer."""
_EVICTION_TARGET = 0.9
"""Fraction of the limit to which eviction shrinks the cache, so that it seldom has to scan the directory."""
_PAUSE_S = 600.0
"""How long caching is paused after the cache was full or could not be written."""


def default_cache_dir() -> Path:
    """Return the cache directory of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distav"


class _CachedFile(NamedTuple):
    """A file in the cache; the sort order is the order of eviction."""

    order_ns: int
    """When it was used last; its negative for files of this dataset."""
    size: int
    path: Path
    own: bool
    """Whether it belongs to this dataset."""


class Cache:
    """The cached files of one dataset, next to those of other datasets.

    Least recently used files of other datasets are evicted first. An epoch reads every sample of a dataset once, so the
    files of this dataset that were used least recently are needed next: a file that is put into the full cache replaces
    none of them, and `reserve` replaces those that were used last. With plain least-recently-used eviction, a cache for
    half of a dataset would serve a seventh of an epoch instead of half. Ranges of a shard that any process has locked
    are not evicted; see `LOCKS`.

    Args:
        root: cache directory, shared with other datasets and processes.
        name: subdirectory of the dataset.
        max_bytes: size limit of `root`; 0 disables the cache.
    """

    def __init__(self, root: Path, name: str, max_bytes: int):
        self.root, self.folder, self.max_bytes = root, root / name, max_bytes
        self._paused_until = 0.0
        self._warned = False

    def get(self, name: str) -> bytes | None:
        """Return the content of a cached file and mark it as used; None if it is not cached."""
        path = self.folder / name
        if not self.max_bytes:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a range of a cached file and mark the file as used; None if it is not cached or shorter."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            content = os.pread(descriptor, size, offset)
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            return content if len(content) == size else None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def contains(self, name: str, size: int) -> bool:
        """Return whether a file of this size is cached."""
        try:
            return os.stat(self.folder / name).st_size == size
        except OSError:
            return False

    def put(self, name: str, content: bytes) -> None:
        """Cache a file if there is room for it."""
        if len(content) > self.max_bytes or time.monotonic() < self._paused_until:
            return
        try:
            if part := self._reserve(len(content), evict_own=False):
                self.store(part, name, content)
                return
        except OSError as error:
            self.warn(error)
        self._paused_until = time.monotonic() + _PAUSE_S

    def reserve(self, size: int) -> Path | None:
        """Return a temporary file that occupies `size` bytes of the limit, for `store` or `discard`.

        Files of this dataset are evicted if necessary. None if the remaining ones are locked.

        Raises:
            OSError: if the cache cannot be written.
        """
        return self._reserve(size, evict_own=True) if size <= self.max_bytes else None

    def store(self, part: Path, name: str, content: bytes) -> None:
        """Write a reserved file and give it its name in the cache; deletes it if that fails with an OSError."""
        try:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(part, "r+b") as file:  # Its size, which others count, must not become 0.
                file.write(content)
            with self._total():  # Nobody counts the files at this moment.
                os.replace(part, self.folder / name)
        except OSError:
            self.discard(part)
            raise

    def discard(self, part: Path) -> None:
        """Delete a reserved file."""
        with contextlib.suppress(OSError):
            size = part.stat().st_size
            with self._total() as total:
                part.unlink()
                total.write(max(0, total.read() - size))

    def drop(self, name: str) -> None:
        """Remove a cached file."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path; on exit the file gets its name in the cache, or is deleted after an exception."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = self._temporary_file(0)
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise

    def _temporary_file(self, size: int) -> Path:
        parts = self.root / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=parts)
        try:
            if size:  # A full disk is noticed before anything is downloaded.
                os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.unlink(part)
            raise
        finally:
            os.close(descriptor)
        return Path(part)

    @contextlib.contextmanager
    def _total(self) -> Iterator["_Total"]:
        """Context that has the total size of all files, which all processes share, to itself."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Total(descriptor, self.max_bytes)
        finally:
            os.close(descriptor)

    def _reserve(self, size: int, evict_own: bool) -> Path | None:
        """Add a size to the total and create its file; returns None if the limit does not allow it."""
        with self._total() as total:
            used = total.read()
            if used + size > self.max_bytes:
                used = self._evict(size, evict_own)
            fits = used + size <= self.max_bytes
            part = self._temporary_file(size) if fits else None
            total.write(used + size if fits else used)
            return part

    def _evict(self, size: int, evict_own: bool) -> int:
        """Delete files until there is room for `size` bytes; return the total size of the remaining files."""
        files, total = self._files()
        target = _EVICTION_TARGET * self.max_bytes - size
        with _EvictionLocks() as locks:
            total = _delete([file for file in files if not file.own], total, target, locks)
            own_target = target if evict_own and total + size > self.max_bytes else self.max_bytes
            return _delete([file for file in files if file.own], total, own_target, locks)

    def _files(self) -> tuple[list[_CachedFile], int]:
        """Return the files that may be evicted, and the total size of all files."""
        files, total = [], 0
        for folder, _, names in os.walk(self.root):
            directory = Path(folder)
            own = directory.is_relative_to(self.folder)
            for path in (directory / name for name in names if name not in ("used", "lock", LOCKS)):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    total += status.st_size
                    if directory == self.folder:
                        continue  # Tables, which are open.
                    if directory.name == "parts" and time.time() - status.st_mtime < _ABANDONED_S:
                        continue  # Another process is writing it.
                    order = -status.st_mtime_ns if own else status.st_mtime_ns
                    files.append(_CachedFile(order, status.st_size, path, own))
        return files, total

    def warn(self, error: OSError) -> None:
        """Log once that the cache cannot be written."""
        if not self._warned:
            self._warned = True
            logging.getLogger("distav").warning(
                "data.cache=%s cannot be written (%s); caching is paused and samples are read from the store.",
                self.root,
                error.strerror or error,
            )


class _Total:
    """The recorded total size of the cached files."""

    def __init__(self, descriptor: int, max_bytes: int):
        self.descriptor, self.max_bytes = descriptor, max_bytes

    def read(self) -> int:
        """Return the total in bytes; the limit if none is recorded, so that the files are counted."""
        recorded = os.pread(self.descriptor, 32, 0)
        return int(recorded) if recorded.isdigit() else self.max_bytes

    def write(self, total: int) -> None:
        os.pwrite(self.descriptor, b"%020d" % total, 0)


def _delete(files: list[_CachedFile], total: int, limit: float, locks: "_EvictionLocks") -> int:
    """Delete files until their total size is within a limit; return the total."""
    for file in sorted(files):
        if total > limit and locks.acquire(file.path):
            with contextlib.suppress(FileNotFoundError):  # Another process was faster.
                os.unlink(file.path)
            total -= file.size
    return total


class _EvictionLocks(contextlib.ExitStack):
    """Exclusive locks of shards whose ranges are evicted."""

    def __init__(self):
        super().__init__()
        self._datasets: dict[Path, NamedLocks] = {}
        self._free: dict[Path, bool] = {}

    def acquire(self, path: Path) -> bool:
        """Return whether a file may be deleted: its shard is locked by no other process, or it has none."""
        shard = path.parent
        if shard.suffix != ".tar":
            return True
        if shard not in self._free:
            if shard.parent not in self._datasets:
                self._datasets[shard.parent] = NamedLocks(shard.parent / LOCKS)
                self.callback(self._datasets[shard.parent].close)
            self._free[shard] = self._datasets[shard.parent].try_acquire(shard.name)
        return self._free[shard]
