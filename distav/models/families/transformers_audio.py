"""Audio networks of transformers: AST, CLAP, wav2vec 2.0, HuBERT, WavLM, Whisper, PE-AV and others.

Legend: B clips, N audio samples, F mel bins, L spectrogram frames, E feature width.
"""

from collections.abc import Mapping
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.model import AudioConfig
from distav.models.audio_front_ends import AudioFrontEnd, KaldiFilterBank, from_preprocessor
from distav.models.encoder import AudioEncoder, AudioInput
from distav.models.families import transformers_networks as networks
from distav.models.families import transformers_weights
from distav.models.layers import with_global_batch_norm
from distav.models.log_mel import FrontEnd
from distav.models.mel import mel_centers
from distav.models.resampling import Resample
from distav.models.weights import interpolate_positions

KEY = "model.audio.name"
DEFAULT_EXTRACTORS = {
    "audio-spectrogram-transformer": "ASTFeatureExtractor",
    "clap_audio_model": "ClapFeatureExtractor",
    "whisper": "WhisperFeatureExtractor",
    "pe_audio_encoder": "PeAudioFeatureExtractor",
}
"""Feature extractor of a network whose repository has no preprocessor, by model type; all others take waveforms."""
EXTRACTOR_SETTINGS = {
    "audio-spectrogram-transformer": {"max_length": "max_length", "num_mel_bins": "num_mel_bins"},
    "clap_audio_model": {"feature_size": "num_mel_bins"},
    "whisper": {"feature_size": "num_mel_bins"},
}
"""Settings of the feature extractor that follow from those of the network, by model type."""
INPUTS = ("input_values", "input_features")
"""Names of waveforms and spectrograms among the arguments of networks."""
DEFAULT_AUDIO_S = 5.0
"""Length of the audio where the network states none."""


class NetworkFrontEnd(FrontEnd):
    """Resamples audio to the rate of a network, and computes the input that it was trained with."""

    def __init__(self, extractor: AudioFrontEnd, sample_rate_hz: int):
        super().__init__()
        self.resample = Resample(sample_rate_hz, extractor.sample_rate_hz)
        self.extractor = extractor
        self.mel_dim, self.time_dim = extractor.mel_dim, extractor.time_dim
        self._rates = sample_rate_hz, extractor.sample_rate_hz

    @property
    def min_samples(self) -> int:
        """Number of audio samples below which there is no output."""
        return ceil(self.extractor.min_samples * self._rates[0] / self._rates[1])

    def num_frames(self, num_samples: int) -> int:
        """Return the size of the time dimension of the output."""
        output = self.forward(torch.zeros(1, num_samples, device="cpu", dtype=torch.float32))
        return output.shape[-1 if self.time_dim is None else self.time_dim]

    def mel_centers_hz(self) -> np.ndarray | None:
        """Return the center frequencies of the mel bins in Hz, [F]; None for waveforms."""
        return None if self.extractor.mel_scale is None else mel_centers(*self.extractor.mel_scale)

    def frame_distance_s(self) -> float | None:
        """Return the distance of two mel frames in seconds; None for waveforms."""
        return None if self.mel_dim is None else self.extractor.hop / self.extractor.sample_rate_hz

    def forward(self, audio: Tensor) -> Tensor:
        """Convert audio [B, N] at the rate of the dataset to the input of the network, float32."""
        # Calls of the modules would run ZeRO-3's hooks, which wait for all ranks.
        return self.extractor.forward(self.resample.forward(audio))


class TransformersAudio(AudioEncoder):
    """The audio part of a network of transformers."""

    def __init__(self, config: AudioConfig, num_frames: int):
        super().__init__(config, num_frames)
        description = config.architecture or self.describe(config)
        settings = description["network"]
        options = {"max_length": num_frames} if _interpolates(config, settings) else {}
        self.network: Any = with_global_batch_norm(networks.build(description, **options))
        self.argument = self.network.main_input_name
        self.feature_dim = networks.feature_dim(settings, self.network)
        self.is_fused = bool(settings.get("enable_fusion"))

    def forward(self, mel: Tensor) -> Tensor:
        """Encode the output of the front end to [B, E]."""
        options = {}
        if self.is_fused:  # Clips are never longer than what the network takes.
            options["is_longer"] = torch.zeros(len(mel), 1, dtype=torch.bool, device=mel.device)
        return networks.pooled(self.network(**{self.argument: mel}, **options), self.network)

    @classmethod
    def check(cls, config: AudioConfig) -> None:
        """Check that transformers is installed; the network is looked up when the run is opened."""
        networks.import_transformers(KEY, config.name)

    @classmethod
    def describe(cls, config: AudioConfig) -> dict[str, Any]:
        """Return the settings of network and feature extractor, and the source of the weights."""
        description = networks.describe(config, "audio")
        networks.check_argument("audio", config.name, description, INPUTS)
        settings = description["network"]
        defaults = {
            "feature_extractor_type": DEFAULT_EXTRACTORS.get(settings["model_type"], "Wav2Vec2FeatureExtractor")
        }
        for name, key in EXTRACTOR_SETTINGS.get(settings["model_type"], {}).items():
            if key in settings:
                defaults[name] = settings[key]
        return description | {"preprocessor": defaults | description["preprocessor"]}

    @classmethod
    def input_format(cls, config: AudioConfig) -> AudioInput:
        """Return the audio that the network was trained with."""
        extractor = from_preprocessor(_preprocessor(config), 0)
        # Rounded down, so that no other sample rate makes clips longer.
        longest = floor(100 * (extractor.max_samples or 0) / extractor.sample_rate_hz) / 100
        return AudioInput(longest or DEFAULT_AUDIO_S, longest)

    @classmethod
    def build_front_end(cls, config: AudioConfig, num_samples: int, sample_rate_hz: int) -> FrontEnd:
        """Return the network's own feature extractor, after resampling."""
        preprocessor = _preprocessor(config)
        extractor = from_preprocessor(preprocessor, 0)
        length = ceil(num_samples * extractor.sample_rate_hz / sample_rate_hz)
        if extractor.max_samples and length > extractor.max_samples:
            longest = extractor.max_samples / extractor.sample_rate_hz
            raise UserError(
                f"data.audio_s={num_samples / sample_rate_hz:g} contradicts {KEY}={config.name}, which takes at most "
                f"{longest:g} s; allowed: up to {longest:g}."
            )
        description = config.architecture or cls.describe(config)
        if _interpolates(config, description["network"]) and isinstance(extractor, KaldiFilterBank):
            extractor = from_preprocessor(preprocessor | {"max_length": extractor.frames_of(length)}, length)
        return NetworkFrontEnd(extractor, sample_rate_hz)

    @property
    def backbone(self) -> nn.Module:
        """The network itself."""
        return self.network

    def published_weights(self, config: AudioConfig) -> Mapping[str, Tensor]:
        """Return the weights of a repository or directory."""
        return transformers_weights.download(config, "audio", config.architecture or self.describe(config))

    def with_own_names(
        self, config: AudioConfig, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return weights by the names that the present version of transformers has for them."""
        return transformers_weights.with_own_names(config.architecture or self.describe(config), weights, own)

    def fit_positions(
        self, config: AudioConfig, weights: dict[str, Tensor], own: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the weights with the position embeddings of AST for the length of the clips."""
        name = "embeddings.position_embeddings"
        if name in weights and weights[name].shape != own[name].shape:
            description = config.architecture or self.describe(config)
            old, new = (_patch_grid(values) for values in (description["network"], self.network.config.to_dict()))
            weights[name] = interpolate_positions(weights[name], own[name].shape[1], old, new, dim=1)
        return weights


def _preprocessor(config: AudioConfig) -> dict[str, Any]:
    description = config.architecture or TransformersAudio.describe(config)
    return description["preprocessor"]


def _interpolates(config: AudioConfig, settings: dict[str, Any]) -> bool:
    """Return whether the network is created for the length of the clips; of these networks, only AST has one."""
    return config.interpolate_positions and settings["model_type"] == "audio-spectrogram-transformer"


def _patch_grid(settings: dict[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of patches of AST (Gong et al. 2021, section 2.1)."""
    patch = settings["patch_size"]
    rows = (settings["num_mel_bins"] - patch) // settings["frequency_stride"] + 1
    return rows, (settings["max_length"] - patch) // settings["time_stride"] + 1
