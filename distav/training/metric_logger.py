"""What a run tells while it goes: one console line a logging step, metrics.jsonl, and TensorBoard.

Only the main rank writes these; the others write warnings to logs/.
"""

import json
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from distav.distributed.process_group import World

log = logging.getLogger("distav")


class MetricLogger:
    """Writes scalars, pictures, sounds and lines of one run."""

    def __init__(self, folder: Path, world: World):
        self.world = world
        self._writer: SummaryWriter | None = None
        handler: logging.Handler = logging.StreamHandler(sys.stdout)
        if world.is_main:
            self._writer = SummaryWriter(str(folder / "tensorboard"))
            self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        else:
            (folder / "logs").mkdir(exist_ok=True)
            handler = logging.FileHandler(folder / "logs" / f"rank_{world.rank:03d}.log", delay=True)
            handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.handlers = [handler]
        log.setLevel(logging.INFO)
        log.propagate = False

    def close(self) -> None:
        """Write out what is held back."""
        if self._writer:
            self._writer.close()
            self._metrics.close()

    def info(self, text: str) -> None:
        """Print a line."""
        log.info(text)

    def warn(self, text: str) -> None:
        """Print a warning, on any rank."""
        log.warning(text)

    def log_metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl, and its numbers under keys of the form group/name to TensorBoard."""
        if not self._writer:
            return
        self._metrics.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for key, value in values.items():
            if "/" in key and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(key, value, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Draw the distribution of finite values."""
        values = values[torch.isfinite(values)]
        if self._writer and len(values):
            self._writer.add_histogram(tag, values.float().cpu(), step)

    def confusion(self, tag: str, rows: np.ndarray, columns: np.ndarray, classes: list[str], step: int) -> None:
        """Draw how often a row class goes with a column class, each row as shares, and write the counts as text.

        A tag such as `labels/given_vs_corrected` says what rows and columns are.
        """
        if not self._writer:
            return
        num = len(classes)
        counts = np.bincount(rows * num + columns, minlength=num * num).reshape(num, num)
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        cell = max(1, 320 // num)
        image = np.kron(shares, np.ones((cell, cell)))
        if cell >= 4:
            image[::cell] = image[:, ::cell] = 0.35
        self._writer.add_image(tag, image.astype(np.float32), step, dataformats="HW")
        if num <= 50:
            corner = tag.rpartition("/")[2].replace("_to_", " \\ ")
            head = f"| {corner} | " + " | ".join(classes) + " |\n" + "|---" * (num + 1) + "|\n"
            body = "\n".join(
                f"| **{name}** | " + " | ".join(map(str, row)) + " |" for name, row in zip(classes, counts, strict=True)
            )
            self._writer.add_text(tag, head + body, step)

    def media(self, frames: Tensor, sound: Tensor, spectrogram: Tensor, sample_rate_hz: int, step: int) -> None:
        """Show clips as the model is fed them.

        Args:
            frames: [M, T, H, W, 3] uint8.
            sound: [M, N] float32.
            spectrogram: [M, F, L].
            sample_rate_hz: of the sound.
            step: where on the time axis.
        """
        if not self._writer:
            return
        strips = [torch.cat(list(clip), dim=1) for clip in frames.cpu()]
        self._writer.add_image("input/frames", torch.cat(strips), step, dataformats="HWC")
        low, high = spectrogram.amin((1, 2), keepdim=True), spectrogram.amax((1, 2), keepdim=True)
        levels = ((spectrogram - low) / (high - low + 1e-6)).flip(1).float().cpu()
        gap = torch.ones(*levels.shape[:2], 2)
        beside = torch.cat([each for pair in zip(levels, gap, strict=True) for each in pair], dim=1)
        self._writer.add_image("input/spectrogram", beside, step, dataformats="HW")
        for number, wave in enumerate(sound.float().cpu()):
            self._writer.add_audio(f"input/sound_{number}", wave.clamp(-1, 1), step, sample_rate_hz)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def format_duration(seconds: float) -> str:
    """Return a duration as 1:02:03 or 02:03."""
    total = max(0, round(seconds)) if math.isfinite(seconds) else 0
    hours, rest = divmod(total, 3600)
    return (f"{hours}:" if hours else "") + f"{rest // 60:02d}:{rest % 60:02d}"
