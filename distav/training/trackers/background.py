"""Passes values to a tracker in a thread, at most once, so that the tracker can neither slow nor end a run."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distav.data.files import write_atomically
from distav.training.trackers.external import ExternalTracker
from distav.training.trackers.tracker import Tracker

CLOSE_TIMEOUT_S = 60.0
"""Seconds that the end of a run waits for a tracker."""
_MAX_WAITING = 10_000
"""Calls that wait for a slow tracker; when they are exceeded, it is disabled."""


class LoggedSteps:
    """The last step that was logged by key, in a file, since a run that resumes repeats steps after its checkpoint.

    A step is recorded before it is sent: after a crash, a value may be missing in the tracker, but none is repeated.
    """

    def __init__(self, path: Path):
        self._last: dict[str, int] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # The last line after a crash.
                    self._last |= json.loads(line)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(self._last) + "\n").encode())
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def record(self, keys: list[str], step: int) -> list[str]:
        """Record a step, and return the keys that have not been logged at it or at a later step."""
        keys = [key for key in keys if self._last.get(key, -1) < step]
        if keys:
            recorded = dict.fromkeys(keys, step)
            self._last |= recorded
            self._file.write(json.dumps(recorded) + "\n")
        return keys

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BackgroundTracker(Tracker):
    """Calls a tracker in a thread. After an error it is disabled, with one warning.

    Args:
        name: name of the tracker.
        tracker: the tracker.
        steps: steps that have been logged.
        warn: logs a warning.
    """

    def __init__(self, name: str, tracker: ExternalTracker, steps: LoggedSteps, warn: Callable[[str], None]):
        self._name, self._tracker, self._steps, self._warn = name, tracker, steps, warn
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_WAITING)
        self._is_disabled = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers whose key has not been logged at this step or a later one."""

        def log() -> None:
            if keys := self._steps.record(list(values), step):
                self._tracker.log_scalars(step, {key: values[key] for key in keys})

        self._call(log)

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image, [H, W, 3] uint8, unless its tag has been logged at this step or a later one."""

        def log() -> None:
            if self._steps.record([f"image {tag}"], step):
                self._tracker.log_image(tag, image, step)

        self._call(log)

    def log_report(self, report: dict[str, Any]) -> None:
        """Log the content of report.json."""
        self._call(lambda: self._tracker.log_report(report))

    def close(self) -> None:
        """Wait until all values are sent, for at most `CLOSE_TIMEOUT_S`."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=0 if self._is_disabled else CLOSE_TIMEOUT_S)
        while self._thread.is_alive() and not self._is_disabled and time.monotonic() < deadline:
            self._thread.join(0.1)
        if self._thread.is_alive():
            self._disable(f"has not sent all values after {CLOSE_TIMEOUT_S:g} s")
        self._steps.close()

    def _call(self, call: Callable[[], None]) -> None:
        if self._is_disabled:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._disable(f"is {_MAX_WAITING} values behind")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._try(call)
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._is_disabled:
            return
        try:
            call()
        except Exception as error:  # Of any library: the run goes on.
            self._disable(f"failed ({type(error).__name__}: {error})")

    def _disable(self, reason: str) -> None:
        if not self._is_disabled:
            self._is_disabled = True
            self._warn(
                f"monitor.trackers: {self._name} {reason}. It gets no further values of this run; metrics.jsonl and "
                "TensorBoard have all of them."
            )
