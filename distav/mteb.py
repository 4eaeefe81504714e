"""Exported encoders as a model of mteb, for its audio, video and audio-visual tasks; needs the extra `mteb`.

    import mteb
    from distav.mteb import DistavEncoder

    mteb.evaluate(DistavEncoder("runs/mine/export"), mteb.get_tasks(["ESC50"]))

Inputs of one modality get the features of its tower, and inputs with video and audio those of both towers, each with
unit length. Where the two sides of a task have different modalities, as in retrieval of audio by video, the projections
of the towers are compared instead.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import AudioCollator
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch import Tensor
from torch.nn.functional import interpolate

from distav.config.errors import UserError
from distav.evaluation.embedding import Embedder, Embeddings, normalize_rows
from distav.models.hub import export_folder
from distav.models.pretrained import weights_digest


class DistavEncoder(AbsEncoder):
    """An exported network that embeds video and audio.

    Args:
        model_name: `export/` directory of a run, or `hf://USER/NAME` or `hf://USER/NAME@REVISION` on the hub.
        revision: not used.
        device: name of a device; None: a GPU if there is one.
        views: evenly spaced parts of each input whose features are averaged.

    Raises:
        UserError: if the directory holds no export of encoders.
    """

    def __init__(
        self, model_name: str | Path, revision: str | None = None, *, device: str | None = None, views: int = 3,
        **kwargs: Any,
    ):  # fmt: skip
        if views < 1:
            raise UserError(f"views={views}: allowed: 1 or more.")
        folder = export_folder(model_name)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.embedder, self.views = Embedder.open(folder, torch.device(device)), views
        self.inputs = self.embedder.description["input"]
        name = str(model_name).partition("://")[2] or f"distav/{folder.resolve().parent.name}"
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name.partition("@")[0],
            revision=weights_digest(folder)[:12],
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in self.embedder.model.parameters()),
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=None,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=["video", "audio"],
            experiment_kwargs={"views": views},  # mteb keeps the results of each number apart.
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str,
        prompt_type: Any = None, **kwargs: Any,
    ) -> np.ndarray:  # fmt: skip
        """Return the embeddings of all inputs, [n, E] float32.

        Args:
            inputs: data loader of batches with the lists `video` or `audio` or both.
            task_metadata: metadata of the task.
            hf_split, hf_subset, prompt_type: not used.

        Raises:
            UserError: for inputs with text or images alone.
        """
        # Such as v2a: video is compared with audio, and v2c: classes (c) are learned from features of video.
        first, _, second = task_metadata.category.partition("2")
        in_common_space = "c" not in second and first != second
        inputs.collate_fn = self._clips
        return np.concatenate([self._embed(batch, in_common_space) for batch in inputs])

    def _clips(self, rows: list[dict[str, Any]]) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """Return the frames [V, T, S, S, 3] and the audio [V, N] of the views of each input; None where it has none."""
        return [(self._frames(row.get("video")), self._audio(row)) for row in rows]

    def _frames(self, video: Any) -> np.ndarray | None:
        if video is None:
            return None
        inputs, meta = self.inputs, video.metadata
        first, end = meta.begin_stream_seconds or 0.0, meta.end_stream_seconds
        offsets_s = np.arange(inputs["num_frames"]) * inputs["frame_stride"] / inputs["fps"]
        starts_s = self._starts(end - first, offsets_s[-1] + 1 / inputs["fps"])
        seconds = np.clip(first + starts_s[:, None] + offsets_s, first, end - 0.5 / (meta.average_fps or inputs["fps"]))
        pixels = video.get_frames_played_at(seconds.ravel().tolist()).data
        frames = _fit(pixels, inputs["frame_size"], inputs["squash"])
        return frames.reshape(self.views, -1, *frames.shape[1:])

    def _audio(self, row: dict[str, Any]) -> np.ndarray | None:
        if row.get("audio") is None:
            return None
        rate, length_s = self.inputs["sample_rate_hz"], self.inputs["audio_s"]
        audio = np.asarray(AudioCollator.resample_audio(row, target_sampling_rate=rate), np.float32).reshape(-1)
        length = round(length_s * rate)
        starts = np.round(rate * self._starts(len(audio) / rate, length_s)).astype(int)
        padded = np.pad(audio, (0, max(0, length - len(audio))))
        return np.stack([padded[min(start, len(padded) - length) :][:length] for start in starts])

    def _starts(self, duration_s: float, length_s: float) -> np.ndarray:
        """Return the starts of the views in seconds, evenly spaced; the middle for one view: [V]."""
        slack = max(0.0, duration_s - length_s)
        return np.array([slack / 2]) if self.views == 1 else np.linspace(0, slack, self.views)

    def _embed(self, clips: list[tuple[np.ndarray | None, np.ndarray | None]], in_common_space: bool) -> np.ndarray:
        has_video, has_audio = ([clip[part] is not None for clip in clips] for part in (0, 1))
        if not any(has_video + has_audio):
            raise UserError("distav embeds video and audio; choose tasks with these modalities.")
        frames, audio = (
            np.concatenate([part for clip in clips if (part := clip[index]) is not None]) if all(present) else None
            for index, present in ((0, has_video), (1, has_audio))
        )
        if frames is None and any(has_video) or audio is None and any(has_audio):
            raise UserError("Some inputs of a batch have no video or no audio; distav needs the same for all.")
        embeddings = self.embedder.embed_arrays(frames, audio)
        rows = _rows(embeddings, in_common_space)
        return rows.reshape(len(clips), self.views, -1).mean(1).astype(np.float32)


def _rows(embeddings: Embeddings, in_common_space: bool) -> np.ndarray:
    """Return the features or embeddings of the modalities that clips have: [n, E]."""
    names = ("visual_embedding", "audio_embedding") if in_common_space else ("visual", "audio")
    has = embeddings.has_visual.any(), embeddings.has_audio.any()
    parts = [normalize_rows(getattr(embeddings, name)) for name, exists in zip(names, has, strict=True) if exists]
    return np.mean(parts, axis=0) if in_common_space else np.concatenate(parts, axis=1)


def _fit(pixels: Tensor, size: int, squash: bool) -> np.ndarray:
    """Return frames of the size of the network, of their largest centered square unless `squash`.

    Args:
        pixels: [T, 3, H, W] uint8.
        size: height and width in pixels.
        squash: whether to scale height and width separately.

    Returns:
        [T, S, S, 3] uint8.
    """
    height, width = pixels.shape[2:]
    if not squash:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, :, top : top + side, left : left + side]
    resized = interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
