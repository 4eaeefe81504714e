"""Zero-shot classification: clips are compared with texts that name the classes (Radford et al. 2021, section 3.1).

Legend: n clips, V views per clip, C classes, D width of the common space.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from distav.config.errors import UserError, format_list
from distav.console import WorkCounter, show_progress
from distav.evaluation.frozen_tasks import EmbeddedSplit, modality_metrics
from distav.models.families.text_networks import TextNetwork

PROMPTS = {"visual": ("a photo of {}.",), "audio": ("This is a sound of {}.",)}
"""Texts by modality unless others are given, with `{}` in the place of the class."""
OPTION = "--text-networks"
"""Option that names the text networks, for messages."""
_CAPITAL_INSIDE = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class ZeroShot:
    """Text networks and prompts.

    Attributes:
        networks: the text network of each modality that has one.
        prompts: texts by modality.
    """

    networks: Mapping[str, TextNetwork]
    prompts: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, networks: Sequence[TextNetwork], prompts: Mapping[str, Sequence[str]]) -> "ZeroShot":
        """Check text networks and prompts.

        Args:
            networks: text networks, at most one for each modality.
            prompts: texts by modality, with `{}` in the place of the class; those of `PROMPTS` where there are none.

        Raises:
            UserError: if two networks are of one modality, or a prompt does not contain `{}` once.
        """
        by_modality: dict[str, TextNetwork] = {}
        for network in networks:
            for modality in network.modalities:
                if modality in by_modality:
                    raise UserError(
                        f"{OPTION}: {by_modality[modality].name} and {network.name} are both {modality}; allowed: one "
                        "for each modality."
                    )
                by_modality[modality] = network
        for modality, texts in prompts.items():
            for text in texts:
                if text.count("{}") != 1:
                    raise UserError(
                        f"--{modality}-prompts='{text}': allowed: texts with {{}} once, in the place of the class."
                    )
        return cls(by_modality, {modality: prompts.get(modality) or PROMPTS[modality] for modality in PROMPTS})

    def check_towers(self, description: Mapping[str, Any]) -> None:
        """Check that the towers of an export have the networks of the checkpoints.

        Raises:
            UserError: if a tower has another one.
        """
        for modality, network in self.networks.items():
            network.check_tower(modality, description["model"][modality])

    def metrics(self, test: EmbeddedSplit, classes: Sequence[str], by_video: bool = False) -> dict[str, float]:
        """Return the metrics of the cosine similarities of clips and classes, by modality.

        The vector of a class is the mean of the unit vectors of its texts; the similarity of a clip is the mean over
        its views. F1 scores of datasets with several labels per clip are left out, since similarities have no natural
        threshold.

        Args:
            test: features of the towers.
            classes: C names.
            by_video: whether to average over the clips of a video.

        Raises:
            UserError: if no clip has a modality of the networks.
        """
        metrics: dict[str, float] = {}
        networks = {modality: network for modality, network in self.networks.items() if modality in test.features}
        num_texts = sum(len(self.prompts[modality]) for modality in networks) * len(classes)
        with show_progress(num_texts, "texts", "embedding texts") as counter:
            texts = {
                modality: class_vectors(network, modality, classes, self.prompts[modality], counter)
                for modality, network in networks.items()
            }
        for modality, network in networks.items():
            clips = test.features[modality]
            vectors = network.project(clips.features.flatten(0, 1), modality)
            similarities = (vectors @ texts[modality].T).view(*clips.features.shape[:2], len(classes)).mean(1)
            scores = modality_metrics(modality, similarities, clips, by_video)
            several = clips.labels.ndim == 2
            metrics |= {name: value for name, value in scores.items() if not (several and name.startswith("f1"))}
        if not metrics:
            names = format_list([network.name for network in self.networks.values()])
            raise UserError(
                f"{OPTION}={names}: the test clips have no {format_list(self.networks)} modality; "
                "give a text network of a modality that they have, or another --test-split."
            )
        return metrics


def class_vectors(
    network: TextNetwork,
    modality: str,
    classes: Sequence[str],
    prompts: Sequence[str],
    counter: WorkCounter | None = None,
) -> Tensor:
    """Return the unit vector of each class in the space of a modality, and count the texts: [C, D]."""
    names, vectors = [spoken_name(name) for name in classes], []
    for prompt in prompts:
        vectors.append(network.embed([prompt.replace("{}", name) for name in names], modality))
        if counter:
            counter.advance(len(names))
    return normalize(sum(vectors[1:], vectors[0]), dim=1)


def spoken_name(name: str) -> str:
    """Return the name of a class in words: `ApplyEyeMakeup` and `apply_eye_makeup` as `apply eye makeup`."""
    words = _CAPITAL_INSIDE.sub(" ", name).replace("_", " ").split()
    return " ".join(words) if name.isupper() else " ".join(words).lower()
