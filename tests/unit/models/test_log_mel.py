"""The log-mel front end equals torchaudio's transforms, and exported encoders load and run without torchaudio."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distav.config.model import AudioConfig
from distav.models.log_mel import LogMel
from distav.models.mel import mel_filters
from distav.models.pretrained import load_encoders
from tests.helpers.exports import example_clips, write_encoders

BLOCKED = """
import sys

sys.modules["torchaudio"] = None  # Importing it raises ModuleNotFoundError.
from distav.tools.embed import main

sys.exit(main(sys.argv[1:]))
"""
RATES = [(8000, 40), (16000, 64), (16000, 128), (22050, 80), (48000, 128)]


@pytest.mark.parametrize(("rate", "num_mels"), RATES)
@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
def test_log_mel_is_that_of_torchaudio(rate: int, num_mels: int):
    torchaudio = pytest.importorskip("torchaudio")
    front_end = LogMel(AudioConfig(num_mels=num_mels), rate)
    expected_filters = torchaudio.functional.melscale_fbanks(front_end.num_fft // 2 + 1, 0.0, rate / 2, num_mels, rate)
    filters = mel_filters("htk", front_end.num_fft, num_mels, rate, 0.0, rate / 2, torch.float32)
    torch.testing.assert_close(filters, expected_filters, rtol=0, atol=1e-6)
    mel = torchaudio.transforms.MelSpectrogram(
        rate, front_end.num_fft, front_end.window, front_end.hop, n_mels=num_mels
    )
    audio = torch.randn(3, rate // 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [0.0]])
    level = torch.log(mel(audio) + 1e-5)
    expected = (level - level.mean((1, 2), keepdim=True)) / (level.std((1, 2), keepdim=True) + 1e-3)
    torch.testing.assert_close(front_end(audio)[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("audio", ["small_conv", "hf:ast", pytest.param("hf:wav2vec2", marks=pytest.mark.long)])
def test_exported_encoders_embed_without_torchaudio(audio: str, tmp_path: Path):
    if audio.startswith("hf:"):
        pytest.importorskip("transformers", reason="needs transformers: pip install 'distav[pretrained]'")
        from tests.helpers.hub_networks import save_audio

        save_audio(audio.partition(":")[2], tmp_path / "network")
        audio = f"hf:{tmp_path / 'network'}"
    export = write_encoders(tmp_path / "export", audio=audio)
    frames, waveforms = example_clips(3)
    np.savez(tmp_path / "clips.npz", frames=frames.numpy(), audio=waveforms.numpy())
    arguments = [str(export), str(tmp_path / "clips.npz"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    result = subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    model, _ = load_encoders(export)
    with torch.no_grad():
        expected = {"visual": model.visual(frames), "audio": model.audio(waveforms)}
    table = pq.read_table(tmp_path / "out")
    for name, features in expected.items():
        actual = torch.tensor(table.column(name).to_pylist())
        torch.testing.assert_close(actual, features, rtol=0, atol=1e-5)
        assert features.std(0).max() > 0
