"""Front ends of pretrained audio networks: from audio to what the feature extractors of transformers compute.

The modules process batches on the device of the audio. They have no parameters and no buffers, so that a cast of the
model does not affect them, and always compute in float32. Constructor arguments have the names, units and defaults of
the settings of the extractor in `preprocessor_config.json`.

Legend: B clips, N audio samples, K FFT bins, F mel bins, L mel frames.
"""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.config.errors import UserError, did_you_mean, format_list
from distav.models.input_checks import check_audio
from distav.models.mel import mel_filters


class AudioFrontEnd(nn.Module):
    """Base class of the front ends. Windows and filters are cached per device.

    Attributes:
        sample_rate_hz: sample rate of the audio.
        min_samples: smallest number of audio samples.
        max_samples: largest number of audio samples of which no frame is cut; None for any number.
        time_dim: dimension of the output that is time; None for waveforms.
        mel_dim: dimension of the output that is mel bins; None for waveforms.
        mel_scale: arguments of `mel_centers`; None for waveforms.
        hop: distance of two mel frames in samples.
    """

    min_samples: int = 1
    max_samples: int | None = None
    time_dim: int | None = None
    mel_dim: int | None = None
    mel_scale: tuple[str, int, float, float] | None = None
    hop: int = 1
    _compute: Callable[..., Tensor]

    def __init__(self, sample_rate_hz: int, *tables: Callable[[], Tensor]):
        super().__init__()
        self.sample_rate_hz, self._create_tables = sample_rate_hz, tables
        self._tables: dict[torch.device, list[Tensor]] = {}

    def forward(self, audio: Tensor) -> Tensor:
        """Compute the output, float32, from audio [B, N] in [-1, 1] at `sample_rate_hz`.

        Raises:
            ValueError: for audio of another type or shape, or with fewer than `min_samples` samples.
        """
        check_audio(audio, self.min_samples)
        tables = self._tables.get(audio.device)
        if tables is None:
            tables = [create().to(audio.device) for create in self._create_tables]
            if not torch.compiler.is_exporting():  # Tensors of a trace have no values outside of it.
                self._tables[audio.device] = tables
        with torch.autocast(audio.device.type, enabled=False):
            return self._compute(audio.float(), *tables)


class KaldiFilterBank(AudioFrontEnd):
    """Log-mel filter bank of Kaldi (Povey et al. 2011) as in AST (Gong et al. 2021): `ASTFeatureExtractor`.

    From each frame of 25 ms, every 10 ms, its mean is subtracted. Then come pre-emphasis (x_t - 0.97 x_{t-1}), a Hann
    window, the power spectrum, mel filters from 20 Hz to half the sample rate, and the logarithm with the float32
    epsilon as the floor. The result is padded with zeros or cut to L = `max_length` frames; with `do_normalize`, the
    output is (x - mean) / (2 std). Output: [B, L, F].
    """

    time_dim, mel_dim = 1, 2

    def __init__(
        self,
        max_length: int = 1024,
        sampling_rate: int = 16000,
        num_mel_bins: int = 128,
        do_normalize: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
    ):
        window, hop = sampling_rate * 25 // 1000, sampling_rate * 10 // 1000
        num_fft = 1 << (window - 1).bit_length()
        filters = partial(mel_filters, "kaldi", num_fft, num_mel_bins, sampling_rate, 20.0, sampling_rate / 2)
        super().__init__(sampling_rate, partial(torch.hann_window, window, False), filters)
        self.max_length, self.hop, self.num_fft = max_length, hop, num_fft
        self.mel_scale = ("kaldi", num_mel_bins, 20.0, sampling_rate / 2)
        self.mean, self.std = (mean, std) if do_normalize else (0.0, 0.5)
        self.min_samples, self.max_samples = window, window + max_length * hop - 1

    def frames_of(self, num_samples: int) -> int:
        """Return the number of frames that a number of audio samples contains, before padding."""
        return 1 + (num_samples - self.min_samples) // self.hop

    def _compute(self, audio: Tensor, window: Tensor, filters: Tensor) -> Tensor:
        frames = audio[:, : self.max_samples].unfold(1, len(window), self.hop)
        frames = frames - frames.mean(2, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        power = torch.fft.rfft((frames - 0.97 * previous) * window, self.num_fft).abs().square()
        level = (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
        return (F.pad(level, (0, 0, 0, self.max_length - level.shape[1])) - self.mean) / (2 * self.std)


class ClapLogMel(AudioFrontEnd):
    """Log-mel spectrogram of CLAP in dB (Wu et al. 2023): `ClapFeatureExtractor`.

    Audio shorter than `max_length_s` is repeated as often as it fits and then padded with zeros (`padding`:
    `repeatpad`), repeated to the end (`repeat`), or padded with zeros (`pad`). Longer audio is cut to its first
    samples, where the extractor draws crops. The mel scale is Slaney's for `rand_trunc` and HTK's for `fusion`. Output:
    [B, 1, L, F]; for `fusion` [B, 4, L, F], a view of one spectrogram as four. L = 1 + max_samples / hop_length.

    Raises:
        UserError: for another `truncation` or `padding`.
    """

    time_dim, mel_dim = 2, 3

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 48000,
        hop_length: int = 480,
        max_length_s: int = 10,
        fft_window_size: int = 1024,
        frequency_min: float = 0.0,
        frequency_max: float = 14000.0,
        truncation: str = "fusion",
        padding: str = "repeatpad",
    ):
        _check_setting("truncation", truncation, ["fusion", "rand_trunc"])
        _check_setting("padding", padding, ["repeatpad", "repeat", "pad"])
        scale, num_copies = ("htk", 4) if truncation == "fusion" else ("slaney", 1)
        filters = (scale, fft_window_size, feature_size, sampling_rate, frequency_min, frequency_max)
        super().__init__(sampling_rate, partial(torch.hann_window, fft_window_size), partial(mel_filters, *filters))
        self.max_samples: int = max_length_s * sampling_rate
        self.hop, self.num_copies, self.padding = hop_length, num_copies, padding
        self.mel_scale = (scale, feature_size, frequency_min, frequency_max)

    def _compute(self, audio: Tensor, window: Tensor, filters: Tensor) -> Tensor:
        size, length = self.max_samples, audio.shape[1]
        repeats = {"repeatpad": size // length, "repeat": -(-size // length), "pad": 1}[self.padding]
        level = 10 * _log10_mel(audio.repeat(1, max(1, repeats))[:, :size], size, self.hop, window, filters)
        return level.transpose(1, 2)[:, None].expand(-1, self.num_copies, -1, -1)


class WhisperLogMel(AudioFrontEnd):
    """Log-mel spectrogram of Whisper (Radford et al. 2023): `WhisperFeatureExtractor` without dither.

    Audio is padded with zeros or cut to `chunk_length` seconds. With x = log10 of the mel powers (Slaney's scale up to
    8 kHz) and m = max(x) of the clip, the output [B, F, L] is (max(x, m - 8) + 4) / 4. L = max_samples / hop_length.
    """

    time_dim, mel_dim = 2, 1

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        chunk_length: int = 30,
        n_fft: int = 400,
    ):
        filters = partial(mel_filters, "slaney", n_fft, feature_size, sampling_rate, 0.0, 8000.0)
        super().__init__(sampling_rate, partial(torch.hann_window, n_fft), filters)
        self.max_samples: int = chunk_length * sampling_rate
        self.hop, self.num_frames = hop_length, self.max_samples // hop_length
        self.mel_scale = ("slaney", feature_size, 0.0, 8000.0)

    def _compute(self, audio: Tensor, window: Tensor, filters: Tensor) -> Tensor:
        # Only frames that touch the audio are transformed; those after it have the value of the floor.
        num_samples = min(audio.shape[1] + len(window), self.max_samples)
        level = _log10_mel(audio[:, :num_samples], num_samples, self.hop, window, filters)[..., : self.num_frames]
        level = F.pad(level, (0, self.num_frames - level.shape[2]), value=-10.0)
        return (torch.maximum(level, level.amax((1, 2), keepdim=True) - 8) + 4) / 4


class NormalizedWaveform(AudioFrontEnd):
    """Waveform [B, N] of wav2vec 2.0 (Baevski et al. 2020); (x - mean) / sqrt(var + 1e-7) if `do_normalize`."""

    def __init__(self, sampling_rate: int = 16000, do_normalize: bool = True):
        super().__init__(sampling_rate)
        self.do_normalize = do_normalize

    def _compute(self, audio: Tensor) -> Tensor:
        var, mean = torch.var_mean(audio, 1, correction=0, keepdim=True)
        return (audio - mean) / torch.sqrt(var + 1e-7) if self.do_normalize else audio


class MirroredWaveform(AudioFrontEnd):
    """Waveform [B, 1, M] of PE-AV (Vyas et al. 2025), mirrored at its end up to the next multiple M of `hop_length`."""

    def __init__(self, sampling_rate: int = 48000, hop_length: int = 1920):
        super().__init__(sampling_rate)
        self.hop = hop_length

    def _compute(self, audio: Tensor) -> Tensor:
        period = max(1, 2 * audio.shape[1] - 2)
        index = torch.arange(-(-audio.shape[1] // self.hop) * self.hop, device=audio.device) % period
        return audio[:, torch.minimum(index, period - index)][:, None]


FRONT_ENDS: dict[str, type[AudioFrontEnd]] = {
    "ASTFeatureExtractor": KaldiFilterBank,
    "ClapFeatureExtractor": ClapLogMel,
    "WhisperFeatureExtractor": WhisperLogMel,
    "Wav2Vec2FeatureExtractor": NormalizedWaveform,
    "PeAudioFeatureExtractor": MirroredWaveform,
}
"""Front ends by the `feature_extractor_type` of `preprocessor_config.json`."""


def from_preprocessor(settings: dict[str, Any], num_samples: int) -> AudioFrontEnd:
    """Return the front end of a pretrained network.

    Args:
        settings: content of `preprocessor_config.json`; missing keys have the defaults of the extractor.
        num_samples: samples of a clip at the sample rate of the network, to be checked; 0 if not known.

    Raises:
        UserError: for a setting that is not among the allowed values, or for clips that are shorter than a frame.
    """
    kind = str(settings.get("feature_extractor_type"))
    _check_setting("feature_extractor_type", kind, FRONT_ENDS)
    options = {key: settings[key] for key in inspect.signature(FRONT_ENDS[kind]).parameters if key in settings}
    front_end = FRONT_ENDS[kind](**options)
    needed, rate = front_end.min_samples, front_end.sample_rate_hz
    if 0 < num_samples < needed:
        raise UserError(f"Clips of {num_samples} samples at {rate} Hz: {kind} needs {needed}. Use longer clips.")
    return front_end


def _log10_mel(audio: Tensor, num_samples: int, hop: int, window: Tensor, filters: Tensor) -> Tensor:
    """Return log10 of the mel powers [B, F, L] of frames around every `hop`-th of `num_samples` samples."""
    audio = F.pad(audio, (0, num_samples - audio.shape[1]))
    power = torch.stft(audio, len(window), hop, window=window, return_complex=True).abs().square()
    return (filters.T @ power).clamp(min=1e-10).log10()


def _check_setting(key: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: allowed: {format_list(allowed)}.{did_you_mean(value, allowed)}")
