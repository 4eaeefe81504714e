"""Base class of what receives the metrics of a run."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Tracker(ABC):
    """Receives the metrics of one run on the main rank. Values that a tracker cannot show are ignored."""

    @abstractmethod
    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log finite numbers by key, such as `train/loss`."""

    @abstractmethod
    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image: [H, W, 3] uint8."""

    def log_histogram(self, tag: str, values: np.ndarray, step: int) -> None:  # noqa: B027
        """Log the distribution of values: [n] float32, at least one."""

    def log_audio(self, tag: str, waveform: np.ndarray, sample_rate_hz: int, step: int) -> None:  # noqa: B027
        """Log audio: [N] float32 in [-1, 1]."""

    def log_text(self, tag: str, text: str, step: int) -> None:  # noqa: B027
        """Log a text in Markdown."""

    def log_report(self, report: dict[str, Any]) -> None:  # noqa: B027
        """Log the content of report.json."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered, and end the connection."""
