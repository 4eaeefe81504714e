"""Embeddings of clips by an exported network: features of the towers and their projections.

Legend: n clips, E tower width, D embedding width, C classes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.console import WorkCounter, show_progress
from distav.data.dataset import Split
from distav.data.modalities import MODALITIES
from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.sampler import PADDING, padded_batches
from distav.evaluation.fusion import Fusion
from distav.evaluation.inference import clip_logits, iter_outputs
from distav.models.av_model import AVModel
from distav.models.pretrained import input_config, load_encoders

COLUMNS = ("visual", "audio", "visual_embedding", "audio_embedding")
"""Arrays of embeddings that a table stores."""
WIDTH = b"width"
"""Key in the metadata of such a column: its width E or D, which a column of null values does not show."""


@dataclass(frozen=True)
class Embeddings:
    """Outputs of a network for n clips.

    Attributes:
        visual, audio: [n, E] float32 features of the towers.
        visual_embedding, audio_embedding: [n, D] float32 unit vectors in a common space.
        logits: [n, C] float32 of the classifiers on the modalities of the clip, fused as the network was exported;
            random if the run did not train them.
        visual_logits, audio_logits: [n, C] float32 of the classifiers of one modality.
        has_visual, has_audio: [n] bool, whether the clip could be read and has the modality; the other rows are zero.
    """

    visual: np.ndarray
    audio: np.ndarray
    visual_embedding: np.ndarray
    audio_embedding: np.ndarray
    logits: np.ndarray
    visual_logits: np.ndarray
    audio_logits: np.ndarray
    has_visual: np.ndarray
    has_audio: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """Whether the clip could be read: [n] bool."""
        return self.has_visual | self.has_audio

    @classmethod
    def concatenate(cls, parts: Iterable["Embeddings"]) -> "Embeddings":
        """Return the rows of all parts, one part after the other."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def from_table(cls, table: pa.Table) -> "Embeddings":
        """Return the embeddings in a table of `to_table`, which has no logits.

        Raises:
            UserError: if the table is another one.
        """
        if any(WIDTH not in (table.schema.field(name).metadata or {}) for name in COLUMNS):
            raise UserError("the columns of the embeddings do not state their width; run tools/embed.py again.")
        columns = [table.column(name).combine_chunks() for name in COLUMNS]
        valid = [column.is_valid().to_numpy(zero_copy_only=False) for column in columns]
        widths = [int(table.schema.field(name).metadata[WIDTH]) for name in COLUMNS]
        arrays = [np.zeros((len(table), width), np.float32) for width in widths]
        for values, column, rows in zip(arrays, columns, valid, strict=True):
            values[rows] = column.flatten().to_numpy().reshape(-1, values.shape[1])
        none = np.zeros((len(table), 0), np.float32)
        visual, audio, visual_embedding, audio_embedding = arrays
        return cls(visual, audio, visual_embedding, audio_embedding, none, none, none, valid[0], valid[1])

    def joint_features(self) -> np.ndarray:
        """Return the concatenated features of both modalities, each normalized to unit length: [n, 2 E]."""
        return np.concatenate([normalize_rows(self.visual), normalize_rows(self.audio)], axis=1)

    def modality(self, column: str) -> np.ndarray:
        """Return which rows of an array of `COLUMNS` exist: [n] bool."""
        return self.has_visual if column.startswith("visual") else self.has_audio


def normalize_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows of unit length: [n, E] float32; rows that are zero stay zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Embedder:
    """An exported network on a device that embeds clips.

    Attributes:
        model: the network in evaluation mode.
        description: its `config.json`.
        device: device of the network.
        batch_size: clips per batch.
    """

    model: AVModel
    description: dict[str, Any]
    device: torch.device
    batch_size: int = 32

    @classmethod
    def open(cls, export: str | Path, device: torch.device, batch_size: int = 32) -> "Embedder":
        """Load an exported network, from a directory or from the hub: `hf://USER/NAME` or `hf://USER/NAME@REVISION`.

        Raises:
            UserError: if the directory holds no export, or the export of a network on features.
        """
        if batch_size < 1:
            raise UserError(f"--batch-size={batch_size}: allowed: 1 or more.")
        model, description = load_encoders(export)
        return cls(model.to(device), description, device, batch_size)

    def embed_clips(
        self, split: Split, ids: np.ndarray | None = None, counter: WorkCounter | None = None
    ) -> Embeddings:
        """Embed the middle of each clip; see `embed_views`."""
        (embeddings,) = self.embed_views(split, 1, ids, counter)
        return embeddings

    def embed_views(
        self, split: Split, views: int, ids: np.ndarray | None = None, counter: WorkCounter | None = None
    ) -> list[Embeddings]:
        """Embed several parts of each clip, evenly spaced from its beginning to its end; one: its middle.

        Args:
            split: split of a dataset.
            views: number of parts.
            ids: [n] rows of the split; all of them if None.
            counter: counts the parts; None shows progress of its own.

        Returns:
            The embeddings of the first parts of all clips, of the second parts, and so on.

        Raises:
            UserError: if the dataset stores features, or has other rates than those the network was trained on.
        """
        ids = np.arange(len(split)) if ids is None else ids
        self._check_split(split)
        # At least one batch, of padding alone: a rank without clips needs the widths of the embeddings.
        num_batches = max(1, -(-len(ids) // self.batch_size))
        batches = padded_batches(ids, self.batch_size, num_batches)
        loader = Loader(split, input_config(self.description), None, 0, self.batch_size, self.device, views)

        def embed(batch: Batch) -> Embeddings:
            return self._embed(batch.media["frames"], batch.media["audio"], batch.present)

        def embedded(view: int) -> Iterator[Embeddings]:
            for rows, _, part in iter_outputs(embed, loader, batches, view):
                is_clip = rows != PADDING
                counting.advance(int(is_clip.sum()))
                yield _select(part, is_clip)

        shown = nullcontext(counter) if counter else show_progress(views * len(ids), "clips", f"embedding {split.name}")
        with closing(loader), shown as counting:
            return [Embeddings.concatenate(embedded(view)) for view in range(views)]

    def embed_arrays(self, frames: np.ndarray | None, audio: np.ndarray | None) -> Embeddings:
        """Embed clips in memory.

        Args:
            frames: [n, T, H, W, 3] uint8; None if clips have no video.
            audio: [n, N] float32 in [-1, 1]; None if clips have no audio.

        Raises:
            UserError: if the network takes other types or shapes, or clips have neither.
        """
        given = {"visual": frames is not None, "audio": audio is not None}
        if not any(given.values()):
            raise UserError("frames and audio are None; clips need one of them.")
        sample_rate_hz, data = self.description["input"]["sample_rate_hz"], input_config(self.description)
        shape = (data.num_frames, data.frame_size, data.frame_size, 3)
        length = round(data.audio_s * sample_rate_hz)
        if frames is None or audio is None:
            count = len(frames if audio is None else audio)  # pyright: ignore[reportArgumentType]
            frames = np.zeros((count, *shape), np.uint8) if frames is None else frames
            audio = np.zeros((count, length), np.float32) if audio is None else audio
        if frames.shape[1:] != shape or audio.shape[1:] != (length,) or len(frames) != len(audio):
            raise UserError(
                f"frames have shape {frames.shape} and audio has shape {audio.shape}; the network takes "
                f"[n, {', '.join(map(str, shape))}] and [n, {length}], the latter at {sample_rate_hz} Hz."
            )
        if frames.dtype != np.uint8 or audio.dtype.kind != "f":
            raise UserError(
                f"frames are {frames.dtype} and audio is {audio.dtype}; the network takes uint8 from 0 to 255 and "
                "float32 from -1 to 1."
            )
        parts: list[Embeddings] = []
        for start in range(0, len(frames), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch_frames = torch.from_numpy(np.ascontiguousarray(frames[rows])).to(self.device)
            batch_audio = torch.from_numpy(np.ascontiguousarray(audio[rows])).to(self.device)
            present = torch.ones(len(batch_frames), dtype=torch.bool, device=self.device)
            masks = {name: present & given[name] for name in MODALITIES}
            parts.append(self._embed(batch_frames, batch_audio.float(), masks))
        return Embeddings.concatenate(parts)

    def _check_split(self, split: Split) -> None:
        inputs = self.description["input"]
        if split.streams:
            raise UserError(f"{split.root} stores features; the network takes clips.")
        if not len(split):
            raise UserError(f"{split.root}: split {split.name} has no clips.")
        for name, value in (("fps", split.fps), ("sample_rate_hz", split.sample_rate_hz)):
            if value != inputs[name]:
                raise UserError(
                    f"{split.root} has {name}={value:g}, the network was trained on {inputs[name]:g}. Rebuild the "
                    f"dataset with --fps {inputs['fps']:g} --sample-rate {inputs['sample_rate_hz']}."
                )

    def _embed(self, frames: Tensor, audio: Tensor, present: Mapping[str, Tensor]) -> Embeddings:
        """Embed a batch; rows of a missing modality are zero."""
        seeds = torch.zeros(len(frames), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            outputs = self.model(frames, audio, seeds)
        visual, audio_present = present["visual"], present["audio"]
        outputs["logits"] = clip_logits(outputs, present, Fusion.from_description(self.description))
        rows = {
            "visual_features": visual,
            "audio_features": audio_present,
            "visual": visual,
            "audio": audio_present,
            "logits": visual | audio_present,
            "visual_logits": visual,
            "audio_logits": audio_present,
        }
        arrays = [(outputs[name].float() * mask[:, None]).cpu().numpy() for name, mask in rows.items()]
        return Embeddings(*arrays, has_visual=visual.cpu().numpy(), has_audio=audio_present.cpu().numpy())


def _select(embeddings: Embeddings, rows: np.ndarray) -> Embeddings:
    return Embeddings(*(getattr(embeddings, field.name)[rows] for field in fields(Embeddings)))


def to_table(embeddings: Embeddings, columns: dict[str, Any]) -> pa.Table:
    """Return embeddings as a table with a row per clip; null for clips that could not be read or lack the modality.

    Args:
        embeddings: embeddings of n clips.
        columns: further columns, [n] each.
    """
    table = pa.table(columns)
    for name in COLUMNS:
        rows, valid = getattr(embeddings, name), embeddings.modality(name)
        field = pa.field(name, pa.list_(pa.float32()), metadata={WIDTH: str(rows.shape[1]).encode()})
        table = table.append_column(field, _list_array(rows, valid))
    return table


def _list_array(rows: np.ndarray, valid: np.ndarray) -> pa.ListArray:
    """Return lists of floats; not lists of a fixed size, which Parquet readers do not support if some are null."""
    offsets = np.concatenate([[0], np.cumsum(np.where(valid, rows.shape[1], 0))]).astype(np.int32)
    values = np.ascontiguousarray(rows[valid], dtype=np.float32).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(~valid))
