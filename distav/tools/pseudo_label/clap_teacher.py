"""CLAP as an audio teacher. Legend: B clips, T segments, N audio samples, C classes."""

from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.annotations.events import num_segments
from distav.data.dataset import Split
from distav.models.resampling import Resample
from distav.tools.pseudo_label.hub import import_transformers, load_pretrained, tokenize
from distav.tools.pseudo_label.prompts import Prompts

_SPECTROGRAM_BATCH = 32
"""Segments whose spectrograms are computed together, in float64: 20 MB for each segment of ten seconds."""


class CLAPTeacher:
    """CLAP (Wu et al. 2023): scaled cosine similarity of the audio of each segment and a caption per class."""

    modality: ClassVar[str] = "audio"

    def __init__(self, prompts: Prompts, device: torch.device, sample_rate_hz: int, segments: int):
        """Load the network and embed the captions.

        Args:
            prompts: checkpoint and captions.
            device: device of the network.
            sample_rate_hz: sample rate of the audio that `scores` receives.
            segments: number of segments T per clip.

        Raises:
            UserError: if transformers is missing, or if the checkpoint is not a CLAP checkpoint.
        """
        transformers = import_transformers()
        self.device, self.segments = device, segments
        self.frame_size = 0
        self.model = load_pretrained(transformers.ClapModel, prompts.checkpoint).eval().to(device)
        self.feature_extractor = load_pretrained(transformers.AutoFeatureExtractor, prompts.checkpoint)
        self.resample = Resample(sample_rate_hz, int(self.feature_extractor.sampling_rate))
        tokens = tokenize(transformers, prompts.checkpoint, prompts.captions, device)
        with torch.inference_mode():
            captions = self.model.get_text_features(**tokens).pooler_output
            self.captions = F.normalize(captions.float(), dim=1)

    @classmethod
    def from_prompts(cls, prompts: Prompts, split: Split, device: torch.device) -> Self:
        """Return the teacher for the sample rate and the duration of the clips of a split."""
        return cls(prompts, device, split.sample_rate_hz, num_segments(split))

    @torch.inference_mode()
    def scores(self, media: Tensor) -> Tensor:
        """Return [B, T, C] float32 scores of audio [B, N] float32 in [-1, 1].

        A segment is repeated until it has the length of CLAP's input.
        """
        audio = self.resample(media.to(self.device))
        length = audio.shape[1] // self.segments
        starts = np.linspace(0, audio.shape[1], self.segments + 1).round().astype(int)[:-1]
        segments = torch.cat([audio[:, start : start + length] for start in starts.tolist()])
        inputs = torch.cat([self._spectrograms(batch) for batch in segments.split(_SPECTROGRAM_BATCH)])
        # The feature extractor marks one random clip of a batch as longer than the input; none of the segments is.
        is_longer = torch.zeros(len(inputs), 1, dtype=torch.bool, device=self.device)
        features = self.model.get_audio_features(input_features=inputs, is_longer=is_longer).pooler_output
        embeddings = F.normalize(features.float(), dim=1)
        logits = (self.model.logit_scale_a.exp() * embeddings @ self.captions.T).float()
        return logits.unflatten(0, (self.segments, len(media))).transpose(0, 1)

    def _spectrograms(self, segments: Tensor) -> Tensor:
        """Return the input features of segments [B, N]: [B, 1 or 4, frames, mel bins] float32 in decibels.

        The values are those of CLAP's feature extractor, which processes one segment after the other on the CPU. The
        extractor itself is used for segments that it would crop.
        """
        extractor, size = self.feature_extractor, int(self.feature_extractor.nb_max_samples)
        if segments.shape[1] > size or extractor.padding != "repeatpad":
            features = extractor(
                list(segments.cpu().numpy()), sampling_rate=extractor.sampling_rate, return_tensors="pt"
            )
            return features["input_features"].to(self.device)
        fusion = extractor.truncation == "fusion"
        filters = torch.from_numpy(extractor.mel_filters if fusion else extractor.mel_filters_slaney).to(self.device)
        window = torch.hann_window(extractor.fft_window_size, dtype=torch.float64, device=self.device)
        audio = segments.repeat(1, size // segments.shape[1]).double()
        audio = F.pad(audio, (0, size - audio.shape[1]))
        spectrum = torch.stft(audio, len(window), extractor.hop_length, window=window, return_complex=True)
        power = spectrum.abs().square().transpose(1, 2) @ filters
        decibels = 10 * power.clamp_min(1e-10).log10().float()
        return decibels[:, None].expand(-1, 4 if fusion else 1, -1, -1)
