"""Logging of a run: console, metrics.jsonl and TensorBoard.

The main rank writes these. The other ranks write their warnings to `logs/rank_N.log`. When a run returns to a
checkpoint, the records after it are moved to `logs/discarded_metrics.jsonl`, so that metrics.jsonl repeats no step.
"""

import json
import logging
import math
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distav.distributed.process_group import World

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("distav")

_GRID_GRAY, _MAX_TABLE_CLASSES = 0.35, 50


class MetricLogger:
    """Logs lines, scalars, images and audio of one run.

    Metrics and media are written from the first call of `resume_at` on.
    """

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world
        self._writer: SummaryWriter | None = None
        handler: logging.Handler = logging.StreamHandler(sys.stdout)
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
        """Flush and close the files; the logger of the package is as it was before."""
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
        from torch.utils import tensorboard  # Takes half a second to import.

        self._close_files()
        path = self.folder / "metrics.jsonl"
        if path.is_file() and path.stat().st_size > metrics_bytes:
            self._discard_after(path, metrics_bytes)
        self._metrics = open(path, "a", buffering=1)  # noqa: SIM115
        self._writer = tensorboard.SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def _discard_after(self, path: Path, num_bytes: int) -> None:
        """Move the end of metrics.jsonl to the file of discarded records."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with open(path, "r+b") as metrics, open(self.folder / "logs" / "discarded_metrics.jsonl", "ab") as discarded:
            metrics.seek(num_bytes)
            shutil.copyfileobj(metrics, discarded)
            metrics.truncate(num_bytes)

    def _close_files(self) -> None:
        if self._writer:
            self._writer.close()
            self._metrics.close()

    def flush(self) -> None:
        """Write all values that are logged so far to the files."""
        if self._writer:
            self._metrics.flush()
            self._writer.flush()

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl; 0 on ranks that do not write it."""
        return self._metrics.tell() if self._writer else 0

    def info(self, text: str) -> None:
        """Print a line on the main rank."""
        log.info(text)

    def warn(self, text: str) -> None:
        """Log a warning: on the console of the main rank, or in a file on other ranks."""
        log.warning(text)

    def log_metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl, and its finite numbers whose key contains `/` to TensorBoard."""
        if not self._writer:
            return
        self._metrics.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for key, value in values.items():
            if "/" in key and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(key, value, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Log a histogram of the finite values to TensorBoard."""
        values = values[torch.isfinite(values)]
        if self._writer and len(values):
            self._writer.add_histogram(tag, values.float().cpu(), step)

    def confusion(self, tag: str, rows: np.ndarray, columns: np.ndarray, classes: list[str], step: int) -> None:
        """Log a confusion matrix: an image of the fractions per row, and for up to 50 classes a table of counts.

        Args:
            tag: names rows and columns, such as `labels/given_vs_corrected`.
            rows, columns: [N] class numbers.
            classes: names of the classes.
            step: step of the run.
        """
        if not self._writer:
            return
        num = len(classes)
        counts = np.bincount(rows * num + columns, minlength=num * num).reshape(num, num)
        fractions = counts / np.maximum(1, counts.sum(1, keepdims=True))
        cell = max(1, 320 // num)
        image = np.kron(fractions, np.ones((cell, cell)))
        if cell >= 4:
            image[::cell] = image[:, ::cell] = _GRID_GRAY
        self._writer.add_image(tag, image.astype(np.float32), step, dataformats="HW")
        if num <= _MAX_TABLE_CLASSES:
            corner = tag.rpartition("/")[2].replace("_vs_", " \\ ")
            head = f"| {corner} | " + " | ".join(classes) + " |\n" + "|---" * (num + 1) + "|\n"
            body = "\n".join(
                f"| **{name}** | " + " | ".join(map(str, row)) + " |" for name, row in zip(classes, counts, strict=True)
            )
            self._writer.add_text(tag, head + body, step)

    def media(self, frames: Tensor, audio: Tensor, spectrogram: Tensor | None, sample_rate_hz: int, step: int) -> None:
        """Log clips to TensorBoard, as the network receives them.

        Args:
            frames: [M, T, H, W, 3] uint8.
            audio: [M, N] float32.
            spectrogram: [M, F, L]; None if the audio tower takes waveforms.
            sample_rate_hz: sample rate of the audio.
            step: step of the run.
        """
        if not self._writer:
            return
        strips = [torch.cat(list(clip), dim=1) for clip in frames.cpu()]
        self._writer.add_image("input/frames", torch.cat(strips), step, dataformats="HWC")
        if spectrogram is not None:
            low, high = spectrogram.amin((1, 2), keepdim=True), spectrogram.amax((1, 2), keepdim=True)
            levels = ((spectrogram - low) / (high - low + 1e-6)).flip(1).float().cpu()
            gaps = torch.ones(*levels.shape[:2], 2)
            row = torch.cat(list(torch.cat([levels, gaps], dim=2)), dim=1)
            self._writer.add_image("input/spectrogram", row, step, dataformats="HW")
        for number, waveform in enumerate(audio.float().cpu()):
            self._writer.add_audio(f"input/audio_{number}", waveform.clamp(-1, 1), step, sample_rate_hz)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def format_duration(seconds: float) -> str:
    """Return a duration as 1:02:03 or 02:03."""
    total = max(0, round(seconds)) if math.isfinite(seconds) else 0
    hours, rest = divmod(total, 3600)
    return (f"{hours}:" if hours else "") + f"{rest // 60:02d}:{rest % 60:02d}"
