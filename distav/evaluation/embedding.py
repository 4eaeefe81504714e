"""What an exported network makes of clips: features of its towers and their projections.

Legend: n clips, E tower width, D embedding width, C classes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.data.dataset import Split
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import PADDING, padded_batches
from distav.models.av_model import AVModel
from distav.models.pretrained import input_config, load_encoders


@dataclass(frozen=True)
class Embeddings:
    """What a network makes of some clips.

    Attributes:
        visual, audio: [n, E] float32 features of the towers.
        visual_embedding, audio_embedding: [n, D] float32 unit vectors, comparable with each other.
        logits: [n, C] float32 of the classifier over both; noise where the run trained none.
        valid: [n] bool, whether the clip could be read; the other rows are zero.
    """

    visual: np.ndarray
    audio: np.ndarray
    visual_embedding: np.ndarray
    audio_embedding: np.ndarray
    logits: np.ndarray
    valid: np.ndarray

    @classmethod
    def concatenate(cls, parts: Iterable["Embeddings"]) -> "Embeddings":
        """Return the rows of several parts after each other."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    @classmethod
    def from_table(cls, table: pa.Table) -> "Embeddings":
        """Return what `table` put into a table; it holds no logits."""
        names = ("visual", "audio", "visual_embedding", "audio_embedding")
        columns = [table.column(name).combine_chunks() for name in names]
        valid = columns[0].is_valid().to_numpy(zero_copy_only=False)
        rows = [np.zeros((len(table), each.type.list_size), np.float32) for each in columns]
        for values, column in zip(rows, columns, strict=True):
            values[valid] = column.flatten().to_numpy().reshape(-1, values.shape[1])
        return cls(*rows, logits=np.zeros((len(table), 0), np.float32), valid=valid)

    def joint_features(self) -> np.ndarray:
        """Return features of both modalities side by side, each of length 1 where it is not all zero: [n, 2 E]."""
        return np.concatenate([normalize_rows(self.visual), normalize_rows(self.audio)], axis=1)


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows of length 1: [n, E] float32; those all zero stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Embedder:
    """An exported network on a device, ready to embed."""

    model: AVModel
    description: dict[str, Any]
    device: torch.device
    batch_size: int = 32

    @classmethod
    def open(cls, export: Path, device: torch.device, batch_size: int = 32) -> "Embedder":
        """Load a network.

        Raises:
            UserError: where the folder holds none, or one that takes no clips.
        """
        if batch_size < 1:
            raise UserError(f"--batch-size={batch_size}: allowed: from 1 up.")
        model, description = load_encoders(export)
        return cls(model.to(device), description, device, batch_size)

    def embed_clips(self, split: Split, ids: np.ndarray | None = None) -> Embeddings:
        """Embed the middle of clips of a set.

        Args:
            split: where they lie.
            ids: [n] which; all of them where None.

        Raises:
            UserError: where the set has features in place of clips, or other rates than the network learnt from.
        """
        ids = np.arange(len(split)) if ids is None else ids
        self._check(split)
        count = max(1, -(-len(ids) // self.batch_size))  # A rank without clips learns the widths by a batch of padding.
        loader = Loader(split, input_config(self.description), None, 0, self.batch_size, self.device)
        plan = padded_batches(ids, self.batch_size, count)

        def batches() -> Iterator[tuple[Tensor, Tensor, np.ndarray, np.ndarray]]:
            for some, batch in zip(plan, loader.batches((ids, 0) for ids in plan), strict=True):
                yield batch.media["frames"], batch.media["audio"], batch.valid.cpu().numpy(), some != PADDING

        try:
            return self._embedded(batches)
        finally:
            loader.close()

    def embed_arrays(self, frames: np.ndarray, sound: np.ndarray) -> Embeddings:
        """Embed clips that are in memory.

        Args:
            frames: [n, T, H, W, 3] uint8, or float32 from 0 to 255.
            sound: [n, N] float32 in [-1, 1].

        Raises:
            UserError: where shapes are not those that the network takes.
        """
        takes, data = self.description["input"], input_config(self.description)
        shape = (data.num_frames, data.frame_size, data.frame_size, 3)
        length = round(data.audio_s * takes["sample_rate_hz"])
        if frames.shape[1:] != shape or sound.shape[1:] != (length,) or len(frames) != len(sound):
            raise UserError(
                f"frames of shape {frames.shape} and sound of shape {sound.shape}; the network takes "
                f"[n, {', '.join(map(str, shape))}] and [n, {length}], the latter at {takes['sample_rate_hz']} Hz."
            )

        def batches() -> Iterator[tuple[Tensor, Tensor, np.ndarray, np.ndarray]]:
            for start in range(0, len(frames), self.batch_size):
                part = slice(start, start + self.batch_size)
                media = [torch.from_numpy(np.ascontiguousarray(each[part])).to(self.device) for each in (frames, sound)]
                there = np.ones(len(media[0]), dtype=bool)
                yield media[0], media[1].float(), there, there

        return self._embedded(batches)

    def _check(self, split: Split) -> None:
        takes = self.description["input"]
        if split.streams:
            raise UserError(f"{split.root} holds features in place of clips.")
        if not len(split):
            raise UserError(f"{split.root}: split {split.name} has no clips.")
        for name, has in (("fps", split.fps), ("sample_rate_hz", split.sample_rate_hz)):
            if has != takes[name]:
                raise UserError(
                    f"{split.root} has {name}={has:g}, the network learnt from {takes[name]:g}; make the set anew with "
                    f"--fps {takes['fps']:g} --sample-rate {takes['sample_rate_hz']}."
                )

    def _embedded(self, batches: Callable[[], Iterator[tuple[Tensor, Tensor, np.ndarray, np.ndarray]]]) -> Embeddings:
        """Embed batches of frames, sound, what is valid, and what is no padding."""
        names = ("visual_features", "audio_features", "visual", "audio", "logits")
        parts: list[Embeddings] = []
        with torch.no_grad():
            for frames, sound, valid, real in batches():
                seeds = torch.zeros(len(frames), dtype=torch.int64, device=self.device)
                outputs = self.model(frames, sound, seeds)
                rows = (outputs[name].float().cpu().numpy() * valid[:, None] for name in names)
                parts.append(Embeddings(*(each[real] for each in (*rows, valid))))
        return Embeddings.concatenate(parts)


def to_table(embeddings: Embeddings, columns: dict[str, Any]) -> pa.Table:
    """Return embeddings as a table, a row a clip; null where it could not be read.

    Args:
        embeddings: of n clips.
        columns: what else is known of them, [n] each.
    """
    names = ("visual", "audio", "visual_embedding", "audio_embedding")
    found = {name: _lists(getattr(embeddings, name), embeddings.valid) for name in names}
    return pa.table({**columns, **found})


def _lists(rows: np.ndarray, valid: np.ndarray) -> pa.Array:
    values = pa.array(np.ascontiguousarray(rows, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1], mask=pa.array(~valid))
