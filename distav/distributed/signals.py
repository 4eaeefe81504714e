"""Signals that end a run: the first one requests a checkpoint, a second one ends the process at once."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_INTERRUPTED = 75
"""Exit status of a run that was interrupted and has saved a checkpoint: rerun the same command to resume."""
DEBOUNCE_S = 5.0
"""Signals within this time count as one: schedulers signal the launcher and its ranks, and the launcher then signals
the ranks again."""
CTRL_C_DEBOUNCE_S = 0.5
"""The same for Ctrl-C, which a user repeats to end a run at once."""
_PR_SET_PDEATHSIG = 1


class Interrupted(Exception):
    """The run was interrupted by a signal and has saved a checkpoint."""


class ShutdownRequest:
    """Whether this rank has received a signal to shut down."""

    def __init__(self) -> None:
        self._received_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has been received."""
        return self._received_at is not None

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\ndistav: saving a checkpoint; press Ctrl-C again to end the run at once\n")
        elif now - self._received_at > (CTRL_C_DEBOUNCE_S if number == signal.SIGINT else DEBOUNCE_S):
            os._exit(128 + number)


@contextlib.contextmanager
def handle_signals() -> Iterator[ShutdownRequest]:
    """Record the signals in `SIGNALS` as a shutdown request instead of ending the process."""
    _terminate_with_launcher()
    request = ShutdownRequest()
    previous = {number: signal.signal(number, request._on_signal) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminate_with_launcher() -> None:
    """Have the kernel send SIGTERM to this rank when its launcher dies; nothing else would end it."""
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    with contextlib.suppress(OSError):
        if is_torchrun or b"deepspeed.launcher" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
