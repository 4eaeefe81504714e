"""Signals that end a run: the first asks for a checkpoint, a second one ends the process at once."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_INTERRUPTED = 75
"""Exit status of a run that was asked to end and has saved: start the same command again."""
DEBOUNCE_S = 5.0
"""A signal that comes again within so many seconds is the same: schedulers signal a launcher and its ranks, and the
launcher then signals the ranks too."""


_PR_SET_PDEATHSIG = 1


class Interrupted(Exception):
    """The run was asked to end, and has saved."""


class ShutdownRequest:
    """Whether this rank was asked to end."""

    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    def _hear(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > DEBOUNCE_S:
            os._exit(128 + number)


@contextlib.contextmanager
def handle_signals() -> Iterator[ShutdownRequest]:
    """Note the signals instead of ending by them."""
    _end_with_launcher()
    stop = ShutdownRequest()
    before = {each: signal.signal(each, stop._hear) for each in SIGNALS}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end_with_launcher() -> None:
    """Have the system send SIGTERM when the launcher dies that started this rank; nobody else would end it then."""
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
