"""Initial weights of a run: how much of a network they cover, and what is frozen."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors.torch import load_file, save_file

from distav.config.errors import UserError
from distav.config.model import AudioConfig, ModelConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.models.av_model import AVModel
from distav.training.initial_weights import InitialWeights
from tests.helpers.hub_networks import SIDE, save_visual

pytest.importorskip("transformers")
DATA = DataConfig(num_frames=2, frame_size=SIDE, audio_s=0.5)


def initialize(visual: VisualConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the initial weights of a network with a visual tower, and the messages."""
    config = ModelConfig(visual=visual, audio=AudioConfig("small_conv", width=8), hidden_dim=16)
    messages: list[str] = []
    logger = SimpleNamespace(info=messages.append, warn=messages.append)
    return InitialWeights(config, cast(Any, logger))(AVModel(config, DATA, 16000, 4)), messages


@pytest.mark.parametrize("fraction", [0.1, 0.45, 0.8])
def test_weights_cover_at_least_half_of_the_network(fraction: float, tmp_path: Path):
    save_visual("vit", tmp_path / "vit")
    stored = load_file(tmp_path / "vit" / "model.safetensors")
    kept = dict(list(stored.items())[: round(fraction * len(stored))])
    save_file(kept, tmp_path / "part.safetensors")
    config = VisualConfig(f"hf:{tmp_path / 'vit'}", weights=str(tmp_path / "part.safetensors"))
    if fraction > 0.5:
        weights, messages = initialize(config)
        assert len(weights) == len(kept) and f"{len(kept)} of " in messages[0] and "tensors missing" in messages[1]
        return
    with pytest.raises(UserError, match=rf"{len(kept)} of the \d+ tensors of this network are among the weights") as e:
        initialize(config)
    assert "missing are visual.net." in str(e.value) and "model.visual.weights=none for random ones" in str(e.value)


def test_frozen_random_weights_are_warned_about(tmp_path: Path):
    save_visual("vit", tmp_path)
    weights, messages = initialize(VisualConfig(f"hf:{tmp_path}", weights="none", freeze=-1))
    assert not weights and "model.visual.freeze=-1 freezes random weights" in messages[0]
    assert not any("freezes random weights" in text for text in initialize(VisualConfig(f"hf:{tmp_path}", freeze=1))[1])
