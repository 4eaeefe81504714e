"""Parameters of a synthetic problem, and its samples with their truth.

Legend: N samples, C classes, E feature width.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

NOISES = ("symmetric", "prior", "next", "confusable", "matrix", "instance")
"""Label noises; see `tools.bench.coverage.labels`."""
OWNERS = ("visual", "audio", "either")
"""Modalities whose class a label names; "either" draws one for each sample."""


@dataclass(frozen=True)
class ModalityModel:
    """Distribution of the features of one modality: a mixture of several groups for each class.

    Attributes:
        width: E.
        rank: dimension of the subspace that holds the mixture.
        separability: typical distance of two group centers of different classes, in standard deviations of the noise;
            0 for features that do not depend on the class.
        num_groups: groups of each class.
        group_spread: fraction of the variance of the centers that differs between the groups of a class.
        degrees_of_freedom: of the Student t noise.
        variation: standard deviation of the logarithms of the separability of classes and of the noise of groups.
    """

    width: int = 32
    rank: int = 12
    separability: float = 5.0
    num_groups: int = 3
    group_spread: float = 0.4
    degrees_of_freedom: float = 8.0
    variation: float = 0.2


@dataclass(frozen=True)
class CoverageProblem:
    """A synthetic problem; its parameters determine its samples.

    Attributes:
        name, family: names; the name is unique for a seed.
        seed: seed of all random draws.
        num_samples: N.
        num_classes: C.
        zipf: exponent of the class frequencies, rank^-zipf; 0 for balanced classes.
        visual, audio: distributions of the features.
        group_coupling: fraction of the samples whose audio is of the same group as their frames.
        outlier_rate: fraction of the samples with four times the noise, in each modality independently.
        label_noise: one of `NOISES`.
        label_noise_rate: expected fraction of wrong labels among the samples that belong to a class.
        noise_modality: modality whose features determine which labels are wrong under "instance" noise.
        noise_peak: largest probability of a wrong label under "instance" noise; larger than `label_noise_rate`.
        noise_softness: width of the transition to right labels under "instance" noise.
        pair_noise: fraction of the samples with the audio of another sample, which may have the same class.
        open_set_rate: fraction of the samples that belong to none of the classes.
        clips_per_source: mean number of samples of a source, which have nearly the same features.
        has_shared_errors: whether the samples of a source have the same label error.
        owner: one of `OWNERS`.
    """

    name: str
    family: str
    seed: int
    num_samples: int = 1000
    num_classes: int = 10
    zipf: float = 0.0
    visual: ModalityModel = field(default_factory=ModalityModel)
    audio: ModalityModel = field(default_factory=ModalityModel)
    group_coupling: float = 0.0
    outlier_rate: float = 0.0
    label_noise: str = "symmetric"
    label_noise_rate: float = 0.3
    noise_modality: str = "visual"
    noise_peak: float = 0.6
    noise_softness: float = 0.1
    pair_noise: float = 0.0
    open_set_rate: float = 0.0
    clips_per_source: float = 1.0
    has_shared_errors: bool = False
    owner: str = "visual"


@dataclass(frozen=True, eq=False)
class CoverageData:
    """Samples of a problem with their truth.

    Classes of open-set samples are C or larger, one number for each cluster of such samples. An open-set sample
    therefore always has a wrong label, and its pair matches if frames and audio are of the same cluster.

    Attributes:
        num_classes: C.
        visual, audio: [N, E] float32 features.
        given: [N] int64 given labels.
        true: [N] int64 true labels: the class of the modality that owns the label.
        visual_class, audio_class: [N] int64 classes of the frames and of the audio.
        pair_id: [N] int64 sample that the audio was taken from.
        groups: [N] int64 sources.
    """

    num_classes: int
    visual: Tensor
    audio: Tensor
    given: np.ndarray
    true: np.ndarray
    visual_class: np.ndarray
    audio_class: np.ndarray
    pair_id: np.ndarray
    groups: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """[N] bool: labels that differ from the class of the modality that owns them."""
        return self.given != self.true

    @property
    def mismatched(self) -> np.ndarray:
        """[N] bool: pairs whose modalities are of different classes."""
        return self.visual_class != self.audio_class

    def class_rate(self, label: int) -> float | None:
        """Return the fraction of wrong labels among the samples of a true class; None without samples."""
        samples = self.true == label
        return float(self.wrong[samples].mean()) if samples.any() else None
