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

    own: bool
    """Whether it belongs to this dataset."""
    used_ns: int
    size: int
    path: str


class Cache:
    """The cached files of one dataset, next to those of other datasets.

    Least recently used files are evicted first, but only those of other datasets: an epoch reads every sample of a
    dataset once, so evicting a sample of the same dataset would remove one that is read sooner than the new one. If a
    dataset exceeds the limit, the samples that were cached first stay. With plain least-recently-used eviction, a cache
    for half of a dataset would serve a seventh of an epoch instead of half.

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

    def put(self, name: str, content: bytes) -> None:
        """Cache a file if there is room for it."""
        if len(content) > self.max_bytes or time.monotonic() < self._paused_until:
            return
        try:
            if self._reserve(len(content)):
                with self.writing(name) as part:
                    part.write_bytes(content)
                return
        except OSError as error:
            self._warn(error)
        self._paused_until = time.monotonic() + _PAUSE_S

    def drop(self, name: str) -> None:
        """Remove a cached file."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path; on exit the file gets its name in the cache, or is deleted after an exception."""
        parts, path = self.root / "parts", self.folder / name
        for folder in (parts, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=parts)
        os.close(descriptor)
        try:
            yield Path(part)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    def _reserve(self, size: int) -> bool:
        """Add a size to the total that all processes share; return False if the limit does not allow it."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            recorded = os.pread(descriptor, 32, 0)
            used = int(recorded) if recorded.isdigit() else self.max_bytes
            if used + size > self.max_bytes:
                used = self._evict(size)
            fits = used + size <= self.max_bytes
            total = used + size if fits else used
            os.pwrite(descriptor, b"%020d" % total, 0)
            return fits
        finally:
            os.close(descriptor)

    def _evict(self, size: int) -> int:
        """Delete files until there is room for `size` bytes; return the total size of the remaining files."""
        files = sorted(self._files())
        total = sum(file.size for file in files)
        for file in files:
            if total > (self.max_bytes if file.own else _EVICTION_TARGET * self.max_bytes - size):
                with contextlib.suppress(FileNotFoundError):  # Another process was faster.
                    os.unlink(file.path)
                total -= file.size
        return total

    def _files(self) -> Iterator[_CachedFile]:
        """Yield all files of all datasets, except those that are being written."""
        for folder, _, names in os.walk(self.root):
            own = Path(folder).is_relative_to(self.folder)
            for path in (os.path.join(folder, name) for name in names if name not in ("used", "lock")):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    if Path(folder).name == "parts" and time.time() - status.st_mtime < _ABANDONED_S:
                        continue  # Another process is writing it.
                    yield _CachedFile(own, status.st_mtime_ns, status.st_size, path)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logging.getLogger("distav").warning(
                "data.cache=%s cannot be written (%s); caching is paused and samples are read from the store.",
                self.root,
                error.strerror or error,
            )
