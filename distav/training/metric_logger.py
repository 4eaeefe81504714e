"""Logging of a run: console, metrics.jsonl, TensorBoard and trackers.

The main rank writes these. The other ranks write their warnings to `logs/rank_N.log`. When a run returns to a
checkpoint, the records after it are moved to `logs/discarded_metrics.jsonl`, so that metrics.jsonl repeats no step.
"""

import json
import logging
import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.schema import Config
from distav.distributed.process_group import World
from distav.drawing.figures import confusion_matrix
from distav.training.run_dir import nested_settings
from distav.training.trackers.external import TrackedRun
from distav.training.trackers.registry import open_trackers
from distav.training.trackers.tensorboard import TensorBoard
from distav.training.trackers.tracker import Tracker

log = logging.getLogger("distav")

_MAX_TABLE_CLASSES = 50


class _StdoutHandler(logging.Handler):
    """Prints records on what is stdout at that time: it is redirected while a bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            print(self.format(record), flush=True)
        except Exception:  # noqa: BLE001  # A full disk or a closed pipe does not end the training.
            self.handleError(record)


class MetricLogger:
    """Logs lines, scalars, images and audio of one run.

    Metrics and media are written from the first call of `resume_at` on.

    Attributes:
        tensorboard: TensorBoard, for what other trackers do not get; None on other ranks than the main one.
    """

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world
        self.tensorboard: TensorBoard | None = None
        self._external: list[Tracker] = []
        handler: logging.Handler = _StdoutHandler()
        if not world.is_main:
            (folder / "logs").mkdir(exist_ok=True)
            handler = logging.FileHandler(folder / "logs" / f"rank_{world.rank:03d}.log", delay=True)
            handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._original = (log.handlers, log.level, log.propagate)
        log.handlers = [handler]
        log.setLevel(logging.INFO)
        log.propagate = False

    def close(self) -> None:
        """Flush and close files and trackers; the logger of the package is as it was before."""
        for tracker in self._external:
            tracker.close()
        for handler in log.handlers:
            handler.close()
        log.handlers, level, log.propagate = self._original
        log.setLevel(level)
        self._close_files()

    def resume_at(self, step: int, metrics_bytes: int) -> None:
        """Continue after a step, as of a checkpoint; later records are moved, and TensorBoard hides later values.

        Args:
            step: steps of the run so far; 0 for a new run.
            metrics_bytes: value of `metrics_bytes` at that step.
        """
        if not self.world.is_main:
            return
        self._close_files()
        path = self.folder / "metrics.jsonl"
        if path.is_file() and path.stat().st_size > metrics_bytes:
            self._discard_after(path, metrics_bytes)
        self._metrics = open(path, "a", buffering=1)  # noqa: SIM115
        self.tensorboard = TensorBoard(self.folder / "tensorboard", purge_step=step + 1)

    def open_trackers(self, config: Config) -> None:
        """Open the trackers of `monitor.trackers`, which get all values from now on; called on the main rank.

        Raises:
            UserError: if a new run cannot be opened in a tracker.
        """
        if config.monitor.trackers:
            run = TrackedRun(config.run.name, self.folder, nested_settings(config))
            self._external = open_trackers(config.monitor.trackers, run, self.warn)

    def _discard_after(self, path: Path, num_bytes: int) -> None:
        """Move the end of metrics.jsonl to the file of discarded records."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with open(path, "r+b") as metrics, open(self.folder / "logs" / "discarded_metrics.jsonl", "ab") as discarded:
            metrics.seek(num_bytes)
            shutil.copyfileobj(metrics, discarded)
            metrics.truncate(num_bytes)

    def _close_files(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
            self._metrics.close()

    def flush(self) -> None:
        """Write all values that are logged so far to the files."""
        if self.tensorboard:
            self._metrics.flush()
            self.tensorboard.flush()

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl; 0 on ranks that do not write it."""
        return self._metrics.tell() if self.tensorboard else 0

    def info(self, text: str) -> None:
        """Print a line on the main rank."""
        log.info(text)

    def warn(self, text: str) -> None:
        """Log a warning: on the console of the main rank, or in a file on other ranks."""
        log.warning(text)

    def log_metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl, and its finite numbers whose key contains `/` to TensorBoard."""
        if not self.tensorboard:
            return
        self._metrics.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        numbers = {key: float(value) for key, value in values.items() if "/" in key and isinstance(value, int | float)}
        scalars = {key: value for key, value in numbers.items() if math.isfinite(value)}
        if scalars:
            for tracker in self._trackers():
                tracker.log_scalars(step, scalars)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Log a histogram of the finite values."""
        values = values[torch.isfinite(values)]
        if len(values):
            for tracker in self._trackers():
                tracker.log_histogram(tag, values.float().cpu().numpy(), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image: [H, W, 3] uint8."""
        for tracker in self._trackers():
            tracker.log_image(tag, image, step)

    def audio(self, tag: str, waveform: Tensor, sample_rate_hz: int, step: int) -> None:
        """Log audio: [N], clipped to [-1, 1]."""
        samples = waveform.float().clamp(-1, 1).cpu().numpy()
        for tracker in self._trackers():
            tracker.log_audio(tag, samples, sample_rate_hz, step)

    def confusion(self, tag: str, rows: np.ndarray, columns: np.ndarray, classes: list[str], step: int) -> None:
        """Log a confusion matrix: an image, see `confusion_matrix`, and for up to 50 classes a table of all counts.

        Args:
            tag: names rows and columns, such as `labels/given_vs_corrected`.
            rows, columns: [N] class numbers.
            classes: names of the classes.
            step: step of the run.
        """
        if not self.tensorboard:
            return
        num = len(classes)
        counts = np.bincount(rows * num + columns, minlength=num * num).reshape(num, num)
        row_title, _, column_title = tag.rpartition("/")[2].partition("_vs_")
        self.image(tag, confusion_matrix(counts, classes, tag, row_title, column_title), step)
        if num <= _MAX_TABLE_CLASSES:
            head = f"| {row_title} \\ {column_title} | " + " | ".join(classes) + " |\n" + "|---" * (num + 1) + "|\n"
            body = "\n".join(
                f"| **{name}** | " + " | ".join(map(str, row)) + " |" for name, row in zip(classes, counts, strict=True)
            )
            self.tensorboard.log_text(tag, head + body, step)

    def report(self, report: dict[str, Any]) -> None:
        """Pass the content of report.json to the trackers."""
        for tracker in self._trackers():
            tracker.log_report(report)

    def _trackers(self) -> list[Tracker]:
        return [self.tensorboard, *self._external] if self.tensorboard else []


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
