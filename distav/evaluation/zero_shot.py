"""Zero-shot classification: clips are compared with texts that name the classes (Radford et al. 2021, section 3.1).

Legend: n clips, V views per clip, C classes, D width of the common space.
"""

import re
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import normalize

from distav.config.errors import UserError
from distav.evaluation.frozen_tasks import EmbeddedSplit, modality_metrics
from distav.models.families.text_networks import KEY, TextNetwork

PROMPTS = {"visual": ("a photo of {}.",), "audio": ("This is a sound of {}.",)}
"""Texts by modality unless others are given, with `{}` in the place of the class."""
_CAPITAL_INSIDE = re.compile(r"(?<=[a-z])(?=[A-Z])")


def zero_shot_metrics(
    networks: Sequence[TextNetwork],
    test: EmbeddedSplit,
    classes: Sequence[str],
    prompts: Sequence[str] = (),
    by_video: bool = False,
) -> dict[str, float]:
    """Return the metrics of the cosine similarities of clips and classes, by modality.

    The vector of a class is the mean of the unit vectors of its texts; the similarity of a clip is the mean over its
    views. F1 scores of datasets with several labels per clip are left out, since similarities have no natural
    threshold.

    Args:
        networks: text networks, at most one for each modality.
        test: features of the towers.
        classes: C names.
        prompts: texts with `{}` in the place of the class; empty for those of `PROMPTS`.
        by_video: whether to average over the clips of a video.

    Raises:
        UserError: if two networks are of one modality, or a network does not fit the features.
    """
    by_modality: dict[str, TextNetwork] = {}
    for network in networks:
        for modality in network.modalities:
            if modality in by_modality:
                raise UserError(f"{KEY}: {by_modality[modality].name} and {network.name} are both {modality}.")
            by_modality[modality] = network
    metrics: dict[str, float] = {}
    for modality, network in by_modality.items():
        if clips := test.features.get(modality):
            texts = class_vectors(network, modality, classes, prompts or PROMPTS[modality])
            vectors = network.project(clips.features.flatten(0, 1), modality)
            similarities = (vectors @ texts.T).view(*clips.features.shape[:2], len(classes)).mean(1)
            scores = modality_metrics(modality, similarities, clips, by_video)
            several = clips.labels.ndim == 2
            metrics |= {name: value for name, value in scores.items() if not (several and name.startswith("f1"))}
    return metrics


def class_vectors(network: TextNetwork, modality: str, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return the unit vector of each class in the space of a modality: [C, D].

    Raises:
        UserError: if a prompt does not contain `{}` once.
    """
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(f"--prompts='{prompt}': allowed: texts with {{}} once, in the place of the class.")
    names = [spoken_name(name) for name in classes]
    vectors = [network.embed([prompt.replace("{}", name) for name in names], modality) for prompt in prompts]
    return normalize(sum(vectors[1:], vectors[0]), dim=1)


def spoken_name(name: str) -> str:
    """Return the name of a class in words: `ApplyEyeMakeup` and `apply_eye_makeup` as `apply eye makeup`."""
    words = _CAPITAL_INSIDE.sub(" ", name).replace("_", " ").split()
    return " ".join(words) if name.isupper() else " ".join(words).lower()
