"""Ctrl-C in commands with worker processes: the main process handles it alone, and workers print no traceback.

A terminal sends Ctrl-C to all processes of a command. It is blocked while workers start, which inherit this, and each
worker then ignores it.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """Context in which Ctrl-C waits; processes that start here also block it, until they call `ignore_ctrl_c`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def ignore_ctrl_c() -> None:
    """Leave Ctrl-C to the main process; to be called first in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def workers_terminated_by_ctrl_c() -> Iterator[None]:
    """Context in which Ctrl-C terminates the worker processes."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
