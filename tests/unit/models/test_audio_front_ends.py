"""Tests of the audio front ends against the feature extractors of transformers and against torchaudio."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.models.audio_front_ends import (
    FRONT_ENDS,
    AudioFrontEnd,
    ClapLogMel,
    KaldiFilterBank,
    MirroredWaveform,
    NormalizedWaveform,
    WhisperLogMel,
    from_preprocessor,
)
from distav.models.mel import mel_filters
from distav.models.resampling import Resample
from tests.helpers.on_gpu import OnGPU
from tests.helpers.torchaudio import import_torchaudio

transformers = pytest.importorskip("transformers", reason="teachers need transformers: pip install 'distav[teachers]'")
from transformers.audio_utils import mel_filter_bank  # noqa: E402

AST_MODULE = "transformers.models.audio_spectrogram_transformer.feature_extraction_audio_spectrogram_transformer"
TONE = 1
"""Row of the tone in `clips`. Most of its mel powers are rounding errors of float32."""

KALDI_FRAMES = {400: 1, 559: 1, 560: 2, 8399: 50, 8400: 51, 20001: 123}
"""Number of frames of a filter bank by number of audio samples."""


def clips(num_samples: int, rate: int) -> Tensor:
    """Return noise, a tone, silence, and syllables of a voice with pauses: [4, N]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, num_samples, generator=generator)
    time = torch.arange(num_samples) / rate
    phase = 2 * math.pi * torch.cumsum((120 + 30 * torch.sin(4 * time)) / rate, 0)
    voice = torch.stack([torch.sin(k * phase) * math.exp(-(((120 * k - 600) / 900) ** 2)) for k in range(1, 30)]).sum(0)
    speech = 0.1 * voice * torch.sin(16 * time).clamp(min=0) + 0.002 * noise[1]
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * time)
    return torch.stack([0.1 * noise[0], tone, torch.zeros(num_samples), speech]).clamp(-1, 1)


def extract(extractor: Any, audio: Tensor) -> Tensor:
    """Return what an extractor computes from audio [B, N]."""
    batch = extractor([clip.numpy() for clip in audio], sampling_rate=extractor.sampling_rate, return_tensors="pt")
    return batch[extractor.model_input_names[0]].float()


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float, tone_tolerance: float):
    """Compare the outputs for `clips`: absolute tolerances of the tone and of the other clips."""
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    tolerances = torch.full([len(actual)], tolerance)
    tolerances[TONE] = tone_tolerance
    errors = (actual - expected).abs().flatten(1).amax(1)
    assert (errors <= tolerances).all(), f"errors {errors.tolist()}, tolerances {tolerances.tolist()}"


def kaldi_tolerances(uses_torchaudio: bool) -> tuple[float, float]:
    """Return the tolerances for `ASTFeatureExtractor`, which computes in float64 without torchaudio."""
    return (2e-5, 1e-4) if uses_torchaudio else (1e-4, 1e-3)


@pytest.mark.parametrize("scale", ["htk", "kaldi", "slaney"])
@pytest.mark.parametrize(("num_fft", "num_mels", "rate"), [(1024, 64, 48000), (512, 80, 16000)])
def test_mel_filters_are_those_of_transformers(scale: str, num_fft: int, num_mels: int, rate: int):
    norm = "slaney" if scale == "slaney" else None
    num_bins, is_kaldi = num_fft // 2 + 1, scale == "kaldi"
    expected = mel_filter_bank(num_bins, num_mels, 50.0, 7000.0, rate, norm, scale, triangularize_in_mel_space=is_kaldi)
    actual = mel_filters(scale, num_fft, num_mels, rate, 50.0, 7000.0)
    torch.testing.assert_close(actual, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_samples", [400, 9000, 400 + 99 * 160, 400 + 100 * 160, 30000])
@pytest.mark.parametrize("uses_torchaudio", [True, False])
@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_kaldi_filter_bank_is_that_of_ast(num_samples: int, uses_torchaudio: bool, monkeypatch: pytest.MonkeyPatch):
    if uses_torchaudio:
        import_torchaudio()
    monkeypatch.setattr(f"{AST_MODULE}.is_speech_available", lambda: uses_torchaudio)
    audio = clips(num_samples, 16000)
    expected = extract(transformers.ASTFeatureExtractor(max_length=100), audio)
    assert_equal(KaldiFilterBank(max_length=100)(audio), expected, *kaldi_tolerances(uses_torchaudio))


@pytest.mark.parametrize(("rate", "num_mels"), [(16000, 128), (16000, 40), (22050, 64), (48000, 128)])
def test_kaldi_filter_bank_is_that_of_torchaudio(rate: int, num_mels: int):
    kaldi = import_torchaudio("torchaudio.compliance.kaldi")
    audio = clips(rate // 2, rate)
    options: dict[str, Any] = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "dither": 0.0}
    expected = torch.stack(
        [
            kaldi.fbank(clip[None], sample_frequency=rate, num_mel_bins=num_mels, frame_shift=10, **options)
            for clip in audio
        ]
    )
    front_end = KaldiFilterBank(expected.shape[1], rate, num_mels, do_normalize=False)
    assert_equal(front_end(audio), expected, 2e-4, 1e-3)  # torchaudio computes its filters in float32.
    assert (front_end(audio) - expected).abs().mean() < 1e-5


@pytest.mark.parametrize("num_samples", [1000, 14000, 48000, 60000])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_clap_log_mel_is_that_of_clap(num_samples: int, padding: str, truncation: str):
    options: dict[str, Any] = {"max_length_s": 1, "truncation": truncation, "padding": padding, "frequency_min": 50}
    audio = clips(num_samples, 48000)
    expected = extract(transformers.ClapFeatureExtractor(**options), audio[:, :48000])
    actual = ClapLogMel(**options)(audio)
    assert_equal(actual, expected, 1e-3, 0.5)  # dB. The extractor computes in float64.
    is_loud = expected[TONE] > expected[TONE].amax() - 90
    assert (actual - expected)[TONE][is_loud].abs().amax() < 0.02


@pytest.mark.parametrize("num_samples", [1, 16000, 31900, 32000, 40000])
@pytest.mark.parametrize("options", [{}, {"feature_size": 128, "hop_length": 170, "n_fft": 512}])
def test_whisper_log_mel_is_that_of_whisper(num_samples: int, options: dict[str, Any]):
    audio = clips(num_samples, 16000)
    expected = extract(transformers.WhisperFeatureExtractor(chunk_length=2, **options), audio)
    assert_equal(WhisperLogMel(chunk_length=2, **options)(audio), expected, 2e-6, 1e-5)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_normalized_waveform_is_that_of_wav2vec2(do_normalize: bool):
    audio = clips(20000, 16000)
    audio = torch.cat([audio, 0.001 * audio + 0.5])
    expected = extract(transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize), audio)
    actual = NormalizedWaveform(do_normalize=do_normalize)(audio)
    torch.testing.assert_close(actual[:4], expected[:4], rtol=0, atol=5e-6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-4)  # The offset is 5000 times as large as the noise.


@pytest.mark.parametrize("num_samples", [1, 2, 700, 960, 961, 1919, 1920, 1921, 5000])
def test_mirrored_waveform_is_that_of_pe_audio(num_samples: int):
    audio = clips(num_samples, 48000)
    assert torch.equal(MirroredWaveform()(audio), extract(transformers.PeAudioFeatureExtractor(), audio))


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_missing_settings_have_the_defaults_of_the_extractor(name: str):
    extractor = getattr(transformers, name)()
    audio = clips(10240 * extractor.sampling_rate // 1000 + 500, extractor.sampling_rate)[3:]
    audio = audio[:, : getattr(extractor, "nb_max_samples", audio.shape[1])]
    front_end = from_preprocessor({"feature_extractor_type": name}, audio.shape[1])
    torch.testing.assert_close(front_end(audio), extract(extractor, audio), rtol=0, atol=1e-3)
    assert front_end.sample_rate_hz == extractor.sampling_rate


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ASTFeatureExtractor", {"max_length": 60, "num_mel_bins": 64, "mean": -6.0, "std": 3.0}),
        ("ASTFeatureExtractor", {"max_length": 60, "sampling_rate": 22050, "do_normalize": False}),
        ("ClapFeatureExtractor", {"feature_size": 32, "sampling_rate": 16000, "hop_length": 100, "max_length_s": 2,
                                  "fft_window_size": 512, "frequency_min": 100, "frequency_max": 7000,
                                  "truncation": "rand_trunc", "padding": "repeat"}),
        ("WhisperFeatureExtractor", {"feature_size": 40, "sampling_rate": 24000, "hop_length": 200, "chunk_length": 3,
                                     "n_fft": 600}),
        ("Wav2Vec2FeatureExtractor", {"sampling_rate": 8000, "do_normalize": False}),
        ("PeAudioFeatureExtractor", {"sampling_rate": 24000, "hop_length": 700}),
    ],
)  # fmt: skip
def test_settings_have_the_effect_that_they_have_on_the_extractor(name: str, settings: dict[str, Any]):
    if name == "ASTFeatureExtractor" and "sampling_rate" in settings and not transformers.utils.is_speech_available():
        pytest.skip("without torchaudio, ASTFeatureExtractor has frames of 400 samples at every sample rate")
    extractor = getattr(transformers, name)(**settings)
    audio = clips(24000, extractor.sampling_rate)[[0, 3]]
    front_end = from_preprocessor(extractor.to_dict() | {"feature_extractor_type": name, "unknown": 1}, 24000)
    torch.testing.assert_close(front_end(audio), extract(extractor, audio), rtol=0, atol=2e-4)


def test_a_kaldi_filter_bank_for_short_clips_has_the_first_frames():
    settings = {"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": 64}
    audio = clips(16000, 16000)
    front_end = from_preprocessor(settings, 0)
    assert isinstance(front_end, KaldiFilterBank) and front_end.max_length == 1024
    expected = extract(transformers.ASTFeatureExtractor(num_mel_bins=64), audio)
    short = from_preprocessor(settings | {"max_length": front_end.frames_of(16000)}, 16000)
    assert_equal(short(audio), expected[:, :98], *kaldi_tolerances(transformers.utils.is_speech_available()))
    assert (expected[:, 98:] == expected[0, -1, 0]).all()
    for num_samples, num_frames in KALDI_FRAMES.items():
        assert front_end.frames_of(num_samples) == num_frames


def test_numbers_of_frames_are_those_of_torchaudio():
    kaldi = import_torchaudio("torchaudio.compliance.kaldi")
    for num_samples, num_frames in KALDI_FRAMES.items():
        assert len(kaldi.fbank(torch.zeros(1, num_samples))) == num_frames


def front_ends() -> list[AudioFrontEnd]:
    options: list[dict[str, Any]] = [{"truncation": name, "max_length_s": 1} for name in ("fusion", "rand_trunc")]
    mels = [KaldiFilterBank(50), *(ClapLogMel(**option) for option in options), WhisperLogMel(chunk_length=1)]
    return [*mels, NormalizedWaveform(), MirroredWaveform(), Resample(44100, 16000), Resample(16000, 16000)]


def test_dimensions_and_limits_describe_the_output():
    audio = clips(20000, 16000)
    sizes = [(50, 128), (101, 64), (101, 64), (100, 80)]
    for front_end, (num_frames, num_mels) in zip(front_ends(), sizes, strict=False):
        assert front_end.time_dim and front_end.mel_dim and front_end.max_samples
        for num_samples in (front_end.min_samples, 20000):
            shape = front_end(audio[:, :num_samples]).shape
            assert (shape[front_end.time_dim], shape[front_end.mel_dim]) == (num_frames, num_mels)
        limit = front_end.max_samples
        long = clips(limit + 500, 16000)
        assert torch.equal(front_end(long), front_end(long[:, :limit]))
        if front_end.min_samples > 1:
            with pytest.raises(ValueError, match=f"with {front_end.min_samples} samples or more"):
                front_end(audio[:, : front_end.min_samples - 1])
    assert KaldiFilterBank(50).max_samples == 8399 and KALDI_FRAMES[8399] == 50 < KALDI_FRAMES[8400]
    for front_end in front_ends()[4:]:
        assert front_end.time_dim is front_end.mel_dim is front_end.max_samples is None and front_end.min_samples == 1
    assert front_ends()[1](audio).shape[1] == 4 and front_ends()[2](audio).shape[1] == 1


def test_a_clip_has_the_same_output_alone_and_in_a_batch():
    audio = clips(9000, 16000)[[0, 3, 1]]
    for front_end in front_ends():
        alone = torch.cat([front_end(clip[None]) for clip in audio[:2]])
        torch.testing.assert_close(front_end(audio)[:2], alone, rtol=0, atol=1e-4)


def test_precision_is_float32_whatever_the_precision_of_the_model():
    audio = clips(9000, 16000)
    for front_end in front_ends():
        expected = front_end(audio)
        model = nn.Sequential(copy.deepcopy(front_end), nn.Linear(3, 3)).to(torch.bfloat16)
        new = nn.Sequential(front_end, nn.Linear(3, 3)).to(torch.bfloat16)
        assert model[1].weight.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = front_end(audio)
        for actual in (model[0](audio), new[0](audio), front_end(audio.double()), under_autocast):
            assert actual.dtype == torch.float32 and torch.equal(actual, expected)
        assert not list(front_end.parameters()) and not list(front_end.buffers()) and not front_end.state_dict()


def test_a_cast_before_the_first_batch_changes_nothing():
    audio = clips(9000, 16000)
    for one, other in zip(front_ends(), front_ends(), strict=True):
        assert torch.equal(one.to(torch.bfloat16)(audio), other(audio))


def test_tables_are_exact_if_the_first_batch_is_computed_under_zero_3(monkeypatch: pytest.MonkeyPatch):
    audio = clips(9000, 16000)

    def in_bfloat16(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*arguments: Any, **options: Any) -> Tensor:
            tensor = create(*arguments, **options)
            return tensor.bfloat16() if tensor.is_floating_point() else tensor

        return wrapped

    for front_end, other in zip(front_ends()[:-2], front_ends()[:-2], strict=True):
        expected = other(audio)
        with monkeypatch.context() as patch:
            for name in (
                "tensor",
                "empty",
                "zeros",
                "ones",
                "full",
                "arange",
                "eye",
                "randn",
            ):  # As deepspeed.zero.Init.
                patch.setattr(torch, name, in_bfloat16(getattr(torch, name)))
            assert front_end(torch.zeros(1, 9000)).shape[1:] == expected.shape[1:]
        assert torch.equal(front_end(audio), expected)


def test_outputs_have_no_gradient_and_stay_usable_after_inference_mode():
    audio = clips(9000, 16000)
    for front_end in front_ends():
        with torch.inference_mode():
            expected = front_end(audio)
        actual = front_end(audio)
        assert torch.is_grad_enabled() and not actual.requires_grad and torch.equal(actual, expected)
        weight = torch.ones(actual.shape[-1], requires_grad=True)
        (actual * weight).sum().backward()
        torch.testing.assert_close(weight.grad, actual.flatten(0, -2).sum(0))


def test_front_ends_compile_without_a_graph_break():
    audio = clips(9000, 16000)
    modules = [KaldiFilterBank(50), ClapLogMel(max_length_s=1), WhisperLogMel(chunk_length=1), NormalizedWaveform()]
    for front_end in (*modules, MirroredWaveform(), Resample(44100, 16000), modules[0]):  # The last one has its tables.
        torch._dynamo.reset()
        compiled = torch.compile(front_end, fullgraph=True, backend="eager")
        assert torch.equal(compiled(audio), front_end(audio))


@pytest.mark.parametrize(("rate", "new_rate"), [(44100, 16000), (16000, 48000), (22050, 44100), (16000, 16000)])
def test_resampling_is_that_of_torchaudio(rate: int, new_rate: int):
    resample = import_torchaudio("torchaudio.functional").resample
    front_end = Resample(rate, new_rate)
    for num_samples in (1, 999, 20011):
        audio = clips(num_samples, rate)
        actual = front_end(audio)
        torch.testing.assert_close(actual, resample(audio, rate, new_rate), rtol=0, atol=1e-5)
        assert actual.shape[1] == front_end.num_samples(num_samples)
        on_gpu = front_end(audio.as_subclass(OnGPU))
        torch.testing.assert_close(on_gpu, resample(audio.double(), rate, new_rate).float(), rtol=0, atol=5e-7)
    assert torch.equal(actual, audio) == (rate == new_rate)


@pytest.mark.parametrize(
    ("settings", "num_samples", "message"),
    [
        ({}, 16000, "feature_extractor_type=None: allowed: ASTFeatureExtractor, ClapFeatureExtractor, WhisperFeature"),
        (
            {"feature_extractor_type": "ASTFeatureExtracter"},
            16000,
            r"feature_extractor_type=ASTFeatureExtracter: allowed: .*PeAudio.*Did you mean 'ASTFeatureExtractor'\?",
        ),
        (
            {"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand"},
            16000,
            "truncation=rand: allowed: fusion, rand_trunc.",
        ),
        (
            {"feature_extractor_type": "ClapFeatureExtractor", "padding": "zeros"},
            16000,
            "padding=zeros: allowed: repeatpad, repeat, pad.",
        ),
        (
            {"feature_extractor_type": "ASTFeatureExtractor"},
            399,
            "Clips of 399 samples at 16000 Hz: ASTFeatureExtractor needs 400. Use longer clips.",
        ),
    ],
)
def test_settings_without_a_front_end_are_named(settings: dict[str, Any], num_samples: int, message: str):
    with pytest.raises(UserError, match=message):
        from_preprocessor(settings, num_samples)


def test_audio_of_another_type_or_shape_is_named():
    for front_end in front_ends():
        with pytest.raises(ValueError, match=r"torch.int16 .*Divide 16-bit samples by 32768"):
            front_end(torch.zeros(2, 16000, dtype=torch.int16))
        with pytest.raises(ValueError, match=r"\[2, 1, 16000\]; allowed: \[B, N\], one channel per clip"):
            front_end(torch.zeros(2, 1, 16000))
        with pytest.raises(ValueError, match="samples or more"):
            front_end(torch.zeros(2, 0))
