"""Zero-shot classification with a text network."""

import pytest
import torch

from distav.config.errors import UserError
from distav.evaluation.frozen_tasks import EmbeddedSplit, LabeledFeatures
from distav.evaluation.zero_shot import ZeroShot, class_vectors, spoken_name

CLASSES = ["BlowDryHair", "play_violin", "rain"]
NAMES = ["blow dry hair", "play violin", "rain"]


class Space:
    """Compares texts with visual features: one axis for each class, and a further one for each wording."""

    name, modalities = "hf:space", ("visual",)

    def embed(self, texts: list[str], modality: str) -> torch.Tensor:
        del modality
        rows = [[float(name in text) for name in NAMES] + [float("photo" in text), 0.5] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)

    def project(self, features: torch.Tensor, modality: str) -> torch.Tensor:
        del modality
        return torch.nn.functional.normalize(features, dim=1)


def split(labels: torch.Tensor) -> EmbeddedSplit:
    features = torch.nn.functional.one_hot(torch.arange(len(labels)) % 3, 5).float()[:, None].repeat(1, 2, 1)
    features[:, 1, 3] = 0.2
    clips = LabeledFeatures(features, labels, torch.arange(len(labels)) // 2)
    return EmbeddedSplit({"visual": clips}, features[:, 0], features[:, 0], torch.zeros(len(labels)))


def metrics(labels: torch.Tensor, *prompts: str) -> dict[str, float]:
    zero_shot = ZeroShot.of([Space()], {"visual": prompts})  # pyright: ignore[reportArgumentType]
    return zero_shot.metrics(split(labels), CLASSES)


def test_clips_get_the_class_whose_texts_are_nearest():
    right = torch.arange(6) % 3
    assert metrics(right)["top1_visual"] == 1.0
    wrong = right.clone()
    wrong[:3] = (right[:3] + 1) % 3
    assert metrics(wrong, "the {}", "a photo of {}")["top1_visual"] == pytest.approx(0.5)
    several = torch.nn.functional.one_hot(right, 3).bool()
    assert metrics(several)["map_visual"] == 1.0 and not any("f1" in name for name in metrics(several))


def test_class_vectors_are_means_over_the_prompts():
    space = Space()
    vectors = class_vectors(space, "visual", CLASSES, ["the {}", "a photo of {}"])  # pyright: ignore[reportArgumentType]
    mean = space.embed([f"the {name}" for name in NAMES], "visual") + space.embed(
        [f"a photo of {name}" for name in NAMES], "visual"
    )
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(mean, dim=1))


def test_names_are_put_into_words():
    names = ["ApplyEyeMakeup", "apply_eye_makeup", "TV", "Handstand Pushups", "YoYo"]
    expected = ["apply eye makeup", "apply eye makeup", "TV", "handstand pushups", "yo yo"]
    assert [spoken_name(name) for name in names] == expected


def test_prompts_and_networks_are_checked():
    with pytest.raises(UserError, match=r"--visual-prompts='a photo': allowed: texts with \{\} once"):
        metrics(torch.arange(6) % 3, "a photo")
    networks: list[Space] = [Space(), Space()]
    with pytest.raises(UserError, match="hf:space and hf:space are both visual"):
        ZeroShot.of(networks, {})  # pyright: ignore[reportArgumentType]


def test_clips_need_the_modality_of_the_network():
    zero_shot = ZeroShot.of([Space()], {})  # pyright: ignore[reportArgumentType]
    silent = split(torch.arange(6) % 3)
    silent.features["audio"] = silent.features.pop("visual")
    with pytest.raises(UserError, match="--text-networks=hf:space: the test clips have no visual modality"):
        zero_shot.metrics(silent, CLASSES)
