"""What was read from afar, kept on this machine: a folder of bounded size that any number of processes share.

Nothing in it is needed: every file can be fetched again, and who reads one checks it.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_ABANDONED_S = 3600.0
"""Age from which an unfinished file is nobody's."""
_FULL = 0.9
"""Share of the bound down to which room is made, so that the folder is seldom looked through."""
_PAUSE_S = 600.0
"""How long nothing is kept after there was no room, or no way to write."""


def default_cache_dir() -> Path:
    """Return the folder of all caches of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distav"


class Cache:
    """What is kept of one set, beside that of others.

    To make room, the least recently used files go first, but those of other sets: an epoch reads all of a set once,
    so what is thrown out for its next sample is what would be asked for next. A set larger than the bound keeps what
    came first; with plain least-recently-used order half of a set would serve a seventh of an epoch, and not half.

    Args:
        root: the folder, shared with other sets and processes.
        name: the set's folder in it.
        most_bytes: bound of all that lies in `root`; 0 keeps nothing.
    """

    def __init__(self, root: Path, name: str, max_bytes: int):
        self.root, self.folder, self.most_bytes = root, root / name, max_bytes
        self._idle_until = 0.0
        self._told = False

    def get(self, name: str) -> bytes | None:
        """Return what is kept under a name, which counts as a use of it; None where there is nothing."""
        path = self.folder / name
        if not self.most_bytes:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep something, where there is room for it."""
        if len(content) > self.most_bytes or time.monotonic() < self._idle_until:
            return
        try:
            if self._reserve(len(content)):
                with self.writing(name) as part:
                    part.write_bytes(content)
                return
        except OSError as error:
            self._warn(error)
        self._idle_until = time.monotonic() + _PAUSE_S

    def drop(self, name: str) -> None:
        """Forget what is kept under a name."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a path to write to; what was written there is kept under the name, or, after an error, is gone."""
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
        """Add a size to the total that all processes share; returns False where there is no room for it."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            noted = os.pread(descriptor, 32, 0)
            used = int(noted) if noted.isdigit() else self.most_bytes
            if used + size > self.most_bytes:
                used = self._make_room(size)
            fits = used + size <= self.most_bytes
            os.pwrite(descriptor, b"%020d" % (used + size * fits), 0)
            return fits
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> int:
        """Throw files out until there is room for more; returns the bytes of those that stay."""
        found = sorted(self._files())
        total = sum(size for _, _, size, _ in found)
        for own, _, length, path in found:
            if total > (self.most_bytes if own else _FULL * self.most_bytes - size):
                with contextlib.suppress(FileNotFoundError):  # Another process was faster.
                    os.unlink(path)
                total -= length
        return total

    def _files(self) -> Iterator[tuple[bool, int, int, str]]:
        """Yield every file: whether it is this set's, when it was used, its size and path."""
        for folder, _, names in os.walk(self.root):
            own = Path(folder).is_relative_to(self.folder)
            for path in (os.path.join(folder, name) for name in names if name not in ("used", "lock")):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    if Path(folder).name == "parts" and time.time() - status.st_mtime < _ABANDONED_S:
                        continue  # Another process is writing it.
                    yield own, status.st_mtime_ns, status.st_size, path

    def _warn(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            logging.getLogger("distav").warning(
                "data.cache=%s: nothing is kept there (%s); what is read comes from afar every time.",
                self.root,
                error.strerror or error,
            )
