"""The model card of an export: metadata of the hub, content, and the usage example, which is run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import distav
from distav.config.model import AudioConfig, ModelConfig, VisualConfig
from distav.models.pretrained import load_parser
from distav.training.model_card import model_card
from tests.helpers.exports import CLASSES, DATA, write_encoders, write_parser
from tests.helpers.hub_server import TOKEN, hub_server
from tests.helpers.model_cards import front_matter, run_usage

RATE = {"estimate": 0.2, "ci95_low": 0.15, "ci95_high": 0.3}
WIDE = {"estimate": 0.4, "ci95_low": 0.1, "ci95_high": 0.8}
REPORT = {
    "corrections": [{"label_noise_rate": RATE, "pair_mismatch_rate": WIDE}],
    "test": {"top1": 0.875, "by_class": {"both": {}}},
}


class Clips(list[int]):
    """A split of clips.

    Attributes:
        name: its name.
        streams: its feature streams.
    """

    def __init__(self, name: str, number: int, streams: dict[str, Any] | None = None):
        super().__init__(range(number))
        self.name, self.streams = name, streams or {}


def card_of(export: Path, model: ModelConfig, report: dict[str, Any], *, has_test: bool = True, **streams: Any) -> str:
    inputs = json.loads((export / "config.json").read_text())["input"]
    run = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(name="mine"), model=model, phases={"contrastive": 0, "learn": 0}),
        data=SimpleNamespace(
            shards=SimpleNamespace(location="s3://bucket/videos", classes=CLASSES),
            train=Clips("train", 96, streams),
            test=Clips("heldout", 24) if has_test else None,
        ),
        state=SimpleNamespace(correction=SimpleNamespace(has_signal=True)),
    )
    return model_card(cast(Any, run), inputs, report)


def test_the_card_names_data_noise_scores_and_initial_weights(tmp_path: Path):
    visual = VisualConfig("hf:openai/clip", architecture={"source": "openai/clip", "license": "see the source"})
    audio = AudioConfig("hf:local", weights="ast.safetensors", architecture={"source": "ast.safetensors"})
    model = ModelConfig(visual, audio, pretrained="hf://lab/first@v1")
    card = card_of(write_encoders(tmp_path / "export"), model, REPORT)
    metadata = front_matter(card)
    assert metadata["base_model"] == ["openai/clip", "lab/first"] and metadata["pipeline_tag"] == "feature-extraction"
    assert metadata["license"] == "unknown" and metadata["library_name"] == "distav"
    assert {"audio-visual", "video", "audio"} <= set(metadata["tags"])
    for text in (
        "`videos`, 96 training clips, 5 classes:\n  bell, dog, drum, rain, train.",
        "label noise rate 20.0% (95 % interval 15.0% to 30.0%)",
        "pair mismatch rate not identified (95 % interval 10.0% to 80.0%)",
        "`hf:openai/clip` (initial weights: openai/clip, license: see the source)",
        "(initial weights: ast.safetensors, license: see the source)",
        "the export `hf://lab/first@v1`",
        f"frames [B, 4, {DATA.frame_size}, {DATA.frame_size}, 3] uint8, RGB, one in 2 frames at 8 fps",
        "audio [B, 4000] float32 in [-1, 1], 0.5 s at 8000 Hz",
        "The test split `heldout` has 24 clips. `test`: scores on the test split.",
        '"top1": 0.875',
    ):
        assert text in card
    assert "by_class" not in card


def test_a_card_without_test_split_and_estimates_says_so(tmp_path: Path):
    card = card_of(write_encoders(tmp_path / "export"), ModelConfig(), {}, has_test=False)
    assert "There is no test split." in card and "Noise in the training data: not estimated." in card
    assert "`small_conv` (random initial weights)" in card and "base_model" not in front_matter(card)


@pytest.mark.parametrize("kind", ["encoders", "parser"])
def test_the_usage_example_runs_with_a_directory_and_with_the_hub(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'distav[hub]'")
    if kind == "encoders":
        export, streams = write_encoders(tmp_path / "export"), {}
        shapes = {"visual_features": (1, 64), "audio_features": (1, 64), "visual": (1, 16), "audio": (1, 16)}
    else:
        export = write_parser(tmp_path / "export")
        streams = {"clip": SimpleNamespace(steps=5, dim=12), "clap": SimpleNamespace(steps=5, dim=8)}
        shapes = {"segments": (1, 2, 5, len(CLASSES))}
        assert load_parser(export)[1]["input"].keys() == streams.keys()
    card = card_of(export, ModelConfig(), REPORT, has_test=True, **streams)
    (export / "README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    values = run_usage(card, "export")
    assert {name: tuple(values[name].shape) for name in shapes} == shapes
    with hub_server() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        distav.push_to_hub("export", "lab/mine", token=TOKEN)
        uploaded = hub.repositories["lab/mine"].commits[hub.repositories["lab/mine"].revisions["main"]]["README.md"]
        values = run_usage(uploaded.decode(), "hf://lab/mine", named="hf://lab/mine")
    assert {name: tuple(values[name].shape) for name in shapes} == shapes
