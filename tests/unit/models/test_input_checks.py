"""Inputs of the wrong type or shape are rejected with a message that names the argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distav.config.model import AudioConfig, ModelConfig, ParserConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.data.modalities import FeatureStream
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser
from distav.models.towers import AudioTower, VisualTower

DATA = DataConfig(num_frames=4, frame_size=32, audio_s=0.5)
RATE = 8000
FRAMES = torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8)
AUDIO, SEEDS = torch.zeros(2, 4000), torch.arange(2)


@pytest.fixture(scope="module")
def model() -> AVModel:
    config = ModelConfig(VisualConfig("small_conv", width=8), AudioConfig("small_conv", width=8), hidden_dim=16)
    return AVModel(config, DATA, RATE, num_classes=3, num_segments=2).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"frames": FRAMES.float() / 255}, r"frames: torch.float32 \[2, 4, 32, 32, 3\]; allowed: torch.uint8"),
        (lambda: {"frames": FRAMES.numpy()}, r"frames: ndarray; allowed: a torch.Tensor, .*from_numpy\(frames\)"),
        (
            lambda: {"frames": FRAMES.movedim(4, 1)},
            r"frames: torch.uint8 \[2, 3, 4, 32, 32\]; allowed: .*channels last",
        ),
        (lambda: {"frames": FRAMES[0]}, r"frames: torch.uint8 \[4, 32, 32, 3\]; allowed: \[B, T, H, W, 3\]"),
        (lambda: {"frames": FRAMES[:, :0]}, r"frames: torch.uint8 \[2, 0, 32, 32, 3\]"),
        (lambda: {"audio": (AUDIO * 32767).short()}, r"audio: torch.int16 \[2, 4000\]; allowed: .*Divide 16-bit"),
        (lambda: {"audio": AUDIO[:, None]}, r"audio: torch.float32 \[2, 1, 4000\]; allowed: \[B, N\], one channel"),
        (lambda: {"audio": AUDIO[:, :100]}, r"audio: torch.float32 \[2, 100\]; allowed: .*with 129 samples or more"),
        (lambda: {"audio": AUDIO[:1]}, "audio: 1 clips; allowed: 2, as many as `frames` has"),
        (lambda: {"seeds": SEEDS.float()}, r"seeds: torch.float32 \[2\]; allowed: torch.int64 \[2\]"),
        (lambda: {"seeds": SEEDS[:1]}, r"seeds: torch.int64 \[1\]; allowed: torch.int64 \[2\]"),
        (lambda: {"frames": FRAMES[:, :3], "parse": True}, "frames: 3 frames per clip; allowed: a multiple of 2"),
    ],
)
def test_the_model_names_the_wrong_input(model: AVModel, change: Callable[[], dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        model(**{"frames": FRAMES, "audio": AUDIO, "seeds": SEEDS} | change())


def test_towers_accept_other_lengths_and_floating_point_types(model: AVModel):
    assert model.visual(FRAMES[:, :2, :16, :16]).shape == (2, model.visual.feature_dim)
    assert model.audio(AUDIO[:, :129].half()).shape == (2, model.audio.feature_dim)
    assert model(FRAMES, AUDIO, SEEDS, parse=True)["segments"].shape == (2, 2, 2, 3)


def test_towers_check_their_input(model: AVModel):
    with pytest.raises(ValueError, match="frames: torch.float32"):
        model.visual(FRAMES.float())
    with pytest.raises(ValueError, match="audio: torch.int16"):
        model.audio(AUDIO.short())
    with pytest.raises(ValueError, match=r"seeds: torch.int64 \[1\]; allowed: torch.int64 \[2\]"):
        model.audio(AUDIO, SEEDS[:1])


def test_transformers_take_clips_of_one_size():
    visual = VisualTower(VisualConfig("vit_tiny"), DATA, activation_checkpointing=False)
    with pytest.raises(ValueError, match=r"\[2, 4, 16, 16, 3\]; allowed: .* with TxHxW = 4x32x32"):
        visual(FRAMES[:, :, :16, :16])
    audio = AudioTower(AudioConfig("vit_tiny"), DATA, RATE, activation_checkpointing=False)
    with pytest.raises(ValueError, match=r"\[2, 3000\]; allowed: \[B, 4000\], the length of the training clips"):
        audio(AUDIO[:, :3000])


def test_a_model_without_event_parser_parses_nothing():
    config = ModelConfig(VisualConfig("small_conv", width=8), AudioConfig("small_conv", width=8), hidden_dim=16)
    with pytest.raises(ValueError, match="parse: this network has no event parser"):
        AVModel(config, DATA, RATE, num_classes=3)(FRAMES, AUDIO, SEEDS, parse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vggish": None}, r"vggish: this stream is missing; allowed: a floating-point tensor \[2, steps, 16\]"),
        ({"vggish": torch.zeros(2, 16, 10)}, r"vggish: torch.float32 \[2, 16, 10\]; allowed: .*\[2, steps, 16\]"),
        ({"vggish": torch.zeros(2, 10, 16).int()}, r"vggish: torch.int32 .*allowed: a floating-point tensor"),
        ({"resnet": torch.zeros(1, 10, 8)}, r"resnet: torch.float32 \[1, 10, 8\]; allowed: .*\[2, 6, 8\]"),
        ({"resnet": torch.zeros(2, 8)}, r"resnet: torch.float32 \[2, 8\]; allowed: .*\[2, 6, 8\]"),
        ({"seeds": torch.zeros(2)}, r"seeds: torch.float32 \[2\]; allowed: torch.int64 \[B\]"),
    ],
)
def test_the_event_parser_names_the_wrong_stream(change: dict[str, Tensor | None], message: str):
    streams = {"vggish": FeatureStream("audio", 10, 16), "resnet": FeatureStream("visual", 6, 8)}
    config = ParserConfig(width=16, heads=2, ffn_dim=16, token_grids={"resnet": [2, 3]})
    parser = FeatureParser(config, streams, segments=2, num_classes=3).eval()
    inputs: dict[str, Any] = {"vggish": torch.zeros(2, 10, 16), "resnet": torch.zeros(2, 6, 8), "seeds": SEEDS}
    assert parser(**inputs)["video"].shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        parser(**{name: value for name, value in (inputs | change).items() if value is not None})
