"""Teachers: frozen networks that say how well a second of picture, or of sound, goes with the name of a class.

Both are published with text encoders, and are read by transformers from a folder or by their name on the hub.
Legend: B clips, T segments, H W pixels, N audio samples, C classes, D width.
"""

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor

from distav.config.errors import UserError
from distav.tools.pseudo_label.prompts import Prompts

_AT_ONCE = 32
"""Pieces of sound whose spectrograms are computed together, in float64: 20 MB each of ten seconds."""


class Teacher(Protocol):
    """Scores segments of one modality."""

    def scores(self, media: Tensor) -> Tensor:
        """Return [B, T, C] float32 for media [B, ...]; the higher, the likelier."""
        ...


class CLIPTeacher:
    """CLIP (Radford et al. 2021): one frame of each segment against a caption of each class, as scaled cosines."""

    def __init__(self, prompts: Prompts, device: torch.device):
        """Read the network and embed the captions.

        Raises:
            UserError: where transformers is missing, or the checkpoint is none of CLIP's.
        """
        transformers = _transformers()
        self.device = device
        self.model = _read(transformers.CLIPModel, prompts.checkpoint).eval().to(device)
        self.frame_size = int(self.model.config.vision_config.image_size)
        looks = _read(transformers.AutoImageProcessor, prompts.checkpoint)
        self.mean, self.std = (torch.tensor(each, device=device) for each in (looks.image_mean, looks.image_std))
        words = _tokenize(transformers, prompts, device)
        with torch.inference_mode():
            self.captions = _unit(self.model.get_text_features(**words).pooler_output)

    @torch.inference_mode()
    def scores(self, media: Tensor) -> Tensor:
        """Score frames [B, T, H, W, 3] uint8, H = W = `frame_size`."""
        frames = (media.to(self.device).float() / 255 - self.mean) / self.std
        images = frames.flatten(0, 1).permute(0, 3, 1, 2)
        seen = _unit(self.model.get_image_features(pixel_values=images).pooler_output)
        return (self.model.logit_scale.exp() * seen @ self.captions.T).float().unflatten(0, media.shape[:2])


class CLAPTeacher:
    """CLAP (Wu et al. 2023): the sound of each segment against a caption of each class, as scaled cosines."""

    def __init__(self, prompts: Prompts, device: torch.device, sample_rate_hz: int, segments: int):
        """Read the network and embed the captions.

        Args:
            prompts: what is asked.
            device: where to compute.
            sample_rate_hz: of the sound that will be given.
            segments: T that it will be cut into.

        Raises:
            UserError: where transformers is missing, or the checkpoint is none of CLAP's.
        """
        transformers = _transformers()
        self.device, self.rate, self.segments = device, sample_rate_hz, segments
        self.model = _read(transformers.ClapModel, prompts.checkpoint).eval().to(device)
        self.feature_extractor = _read(transformers.AutoFeatureExtractor, prompts.checkpoint)
        words = _tokenize(transformers, prompts, device)
        with torch.inference_mode():
            self.captions = _unit(self.model.get_text_features(**words).pooler_output)

    @torch.inference_mode()
    def scores(self, media: Tensor) -> Tensor:
        """Score sound [B, N] float32 in [-1, 1]; a segment is repeated until it is as long as CLAP's input."""
        rate = int(self.feature_extractor.sampling_rate)
        sound = AF.resample(media.to(self.device).float(), self.rate, rate)
        length = sound.shape[1] // self.segments
        starts = np.linspace(0, sound.shape[1], self.segments + 1).round().astype(int)[:-1]
        pieces = torch.cat([sound[:, start : start + length] for start in starts.tolist()])
        fed = torch.cat([self._spectrograms(some) for some in pieces.split(_AT_ONCE)])
        # The extractor calls one clip of a batch, drawn at random, longer than it is; none here is.
        longer = torch.zeros(len(fed), 1, dtype=torch.bool, device=self.device)
        heard = _unit(self.model.get_audio_features(input_features=fed, is_longer=longer).pooler_output)
        scores = (self.model.logit_scale_a.exp() * heard @ self.captions.T).float()
        return scores.unflatten(0, (self.segments, len(media))).transpose(0, 1)

    def _spectrograms(self, pieces: Tensor) -> Tensor:
        """Return what CLAP's feature extractor makes of sound [B, N]: [B, 1 or 4, frames, mel bins] in decibels.

        The extractor itself takes one piece after the other on the CPU, and serves for those that it would cut.
        """
        hears, size = self.feature_extractor, int(self.feature_extractor.nb_max_samples)
        if pieces.shape[1] > size or hears.padding != "repeatpad":
            fed = hears(list(pieces.cpu().numpy()), sampling_rate=hears.sampling_rate, return_tensors="pt")
            return fed["input_features"].to(self.device)
        fused = hears.truncation == "fusion"
        filters = torch.from_numpy(hears.mel_filters if fused else hears.mel_filters_slaney).to(self.device)
        window = torch.hann_window(hears.fft_window_size, dtype=torch.float64, device=self.device)
        sound = pieces.repeat(1, size // pieces.shape[1]).double()
        sound = F.pad(sound, (0, size - sound.shape[1]))
        spectrum = torch.stft(sound, len(window), hears.hop_length, window=window, return_complex=True)
        power = spectrum.abs().square().transpose(1, 2) @ filters
        levels = 10 * power.clamp_min(1e-10).log10().float()
        return levels[:, None].expand(-1, 4 if fused else 1, -1, -1)


def _unit(embedded: Tensor) -> Tensor:
    return F.normalize(embedded.float(), dim=1)


def _tokenize(transformers: Any, prompts: Prompts, device: torch.device) -> dict[str, Tensor]:
    tokens = _read(transformers.AutoTokenizer, prompts.checkpoint)(prompts.captions, padding=True, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError("teachers need transformers; pip install 'distav[teachers]' brings it.") from None
    return transformers


def _read(kind: Any, checkpoint: str) -> Any:
    """Read a part of a checkpoint; weights in safetensors alone, and no code of its own."""
    options: dict[str, Any] = {"use_safetensors": True} if hasattr(kind, "forward") else {}
    try:
        return kind.from_pretrained(checkpoint, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint={checkpoint}: {kind.__name__} cannot be read from it ({str(error).strip().splitlines()[0]}). "
            "Give a folder in the hub's format, or a name on the hub that can be reached from here."
        ) from None
