"""Division of work among processes on any machines that share a directory.

By default a machine works on a fixed part of the tasks. With leases, all machines work on all of them: a process claims
a task by a lease, a file that it renews as long as it works. A lease that has not been renewed for some time is that of
a process that was killed, and another process takes the task over. Tasks write their results atomically, so a task that
is done twice does no harm.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from distav.config.errors import UserError
from distav.data.files import temporary_path

LEASE_S = 120.0
"""Time after which a lease that was not renewed is invalid."""
_RENEWALS = 6
"""Renewals of a lease in the time in which it is valid."""


class SharedWork:
    """Tasks that this process does alone, or that it shares with others by leases.

    Use it as a context manager; the leases that the process still has are removed at its end.

    Args:
        folder: directory of the leases.
        tasks: names of the tasks.
        is_done: whether the result of a task exists.
        leased: whether other processes work on the same tasks.
        lease_s: time after which a lease that was not renewed is invalid.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Sequence[str],
        is_done: Callable[[str], bool],
        *,
        leased: bool,
        lease_s: float = LEASE_S,
    ):
        self.folder, self.is_done, self.leased, self.lease_s = folder, is_done, leased, lease_s
        self._remaining = list(tasks)
        self._claimed: set[str] = set()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self.leased:
            threading.Thread(target=self._renew, name="leases", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for task in list(self._claimed):
            self.release(task)

    def next(self) -> str | None:
        """Claim a task that is neither done nor claimed, and return its name; None if there is none now."""
        with self._lock:
            self._drop_done()
            for task in self._remaining:
                if task not in self._claimed and (not self.leased or self._take(task)):
                    self._claimed.add(task)
                    if not self.is_done(task):
                        return task
                    self._release(task)
        return None

    def release(self, task: str) -> None:
        """Give a task back, done or not."""
        with self._lock:
            self._release(task)

    def finished(self) -> bool:
        """Whether all tasks are done, by any process."""
        with self._lock:
            self._drop_done()
            return not self._remaining

    def _drop_done(self) -> None:
        self._remaining = [task for task in self._remaining if not self.is_done(task)]

    def _release(self, task: str) -> None:
        self._claimed.discard(task)
        if self.leased:
            self._path(task).unlink(missing_ok=True)

    def _take(self, task: str) -> bool:
        """Create the lease of a task; whether it was free or no longer valid."""
        path = self._path(task)
        for _ in range(2):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return True
            except FileExistsError:
                if not self._is_invalid(path):
                    return False
            # Only one process can rename the file.
            abandoned = temporary_path(path)
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, abandoned)
                abandoned.unlink(missing_ok=True)
        return False

    def _is_invalid(self, path: Path) -> bool:
        """Whether a lease was not renewed in time, by the clock of the file system."""
        probe = temporary_path(path)
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            return now - path.stat().st_mtime > self.lease_s
        except FileNotFoundError:
            return True

    def _renew(self) -> None:
        while not self._stop.wait(self.lease_s / _RENEWALS):
            for task in list(self._claimed):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._path(task))

    def _path(self, task: str) -> Path:
        return self.folder / f"{task}.lease"


@dataclass(frozen=True)
class Part:
    """The tasks that one of several machines works on.

    Attributes:
        index, count: every `count`-th one, from `index` on.
        leased: whether the machines share these tasks by leases.
    """

    index: int = 0
    count: int = 1
    leased: bool = False

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parse `I/N`, or `any`: all tasks, shared by leases.

        Raises:
            UserError: for any other text, or an I outside 0..N-1.
        """
        if text == "any":
            return cls(leased=True)
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError(
                f"--part={text}: has to be I/N with I from 0 to N-1, e.g. 0/4 for the first of four parts; or any."
            )
        return cls(int(match[1]), int(match[2]))

    def indices(self, total: int) -> range:
        """Return the indices of its tasks."""
        return range(self.index, total, self.count)

    def work(self, folder: Path, tasks: Sequence[str], is_done: Callable[[str], bool]) -> SharedWork:
        """Return the work on its tasks among all tasks."""
        own = [tasks[index] for index in self.indices(len(tasks))]
        return SharedWork(folder, own, is_done, leased=self.leased)


def wait_for_others() -> None:
    """Wait a moment for tasks that other processes have claimed."""
    time.sleep(1.0)
