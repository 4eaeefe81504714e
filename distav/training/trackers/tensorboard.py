"""TensorBoard: scalars, images, audio, histograms, hyperparameters and the embedding projector."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distav.training.trackers.tracker import Tracker


class TensorBoard(Tracker):
    """Event files of TensorBoard.

    Args:
        folder: directory of the event files.
        purge_step: TensorBoard hides earlier values from this step on.
    """

    def __init__(self, folder: Path, purge_step: int):
        from torch.utils import tensorboard  # Takes half a second to import.

        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=purge_step)

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log finite numbers by key."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image: [H, W, 3] uint8."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def log_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Log the distribution of values: [n] float32."""
        self._writer.add_histogram(tag, values, step)

    def log_audio(self, tag: str, waveform: np.ndarray, sample_rate_hz: int, step: int) -> None:
        """Log audio: [N] float32 in [-1, 1]."""
        self._writer.add_audio(tag, waveform, step, sample_rate_hz)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a text in Markdown."""
        self._writer.add_text(tag, text, step)

    def log_hyperparameters(self, settings: Mapping[str, bool | float | str], metrics: Mapping[str, float]) -> None:
        """Log the settings of the run, with the scalars that the page of the hyperparameters shows.

        Args:
            settings: values by key.
            metrics: scalars by key, which `log_scalars` has logged.
        """
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would write them as a run of its own.
        file_writer: Any = self._writer.file_writer
        for summary in hparams(dict(settings), dict(metrics)):
            file_writer.add_summary(summary)

    def log_embeddings(
        self,
        tag: str,
        features: np.ndarray,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        thumbnails: np.ndarray,
        step: int,
    ) -> None:
        """Log features of clips for the embedding projector.

        Args:
            tag: name of the features.
            features: [n, E] float32.
            columns: names of the texts of a clip, at least two.
            rows: texts of each clip.
            thumbnails: [n, H, W, 3] uint8.
            step: step of the run.
        """
        images = torch.from_numpy(thumbnails).permute(0, 3, 1, 2) / 255
        with contextlib.redirect_stdout(io.StringIO()):  # A line if a run writes its report twice.
            self._writer.add_embedding(features, [list(row) for row in rows], images, step, tag, list(columns))

    def flush(self) -> None:
        """Write all values that are logged so far to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the files."""
        self._writer.close()
