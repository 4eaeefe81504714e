"""Injection of label noise and mismatched pairs into a dataset, to evaluate methods against known truth.

Both are drawn from a seed when the dataset is built and stored in it as `true_label` and `pair_id`.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from distav.config.errors import UserError, did_you_mean
from distav.config.label_noise import LABEL_NOISE_KINDS, parse_label_noise


@dataclass(frozen=True)
class LabelNoise:
    """Label noise: `symmetric` or `asymmetric`, and the fraction of wrong labels."""

    kind: str
    rate: float

    @classmethod
    def parse(cls, text: str, option: str = "--label-noise") -> Self | None:
        """Parse `symmetric:RATE` or `asymmetric:RATE`; empty text means no noise.

        Args:
            text: the value of the option.
            option: its name, for error messages.

        Raises:
            UserError: for another kind, or a rate outside 0..1.
        """
        parsed = parse_label_noise(text)
        if parsed is None:
            return None
        kind, rate = parsed
        if kind not in LABEL_NOISE_KINDS:
            raise UserError(
                f"{option}={text}: has to be symmetric:RATE or asymmetric:RATE.{did_you_mean(kind, LABEL_NOISE_KINDS)}"
            )
        if math.isnan(rate):
            raise UserError(f"{option}={text}: the rate has to be a number from 0 to 1.")
        return cls(kind, rate)


def flip_labels(labels: np.ndarray, num_classes: int, noise: LabelNoise, rng: np.random.Generator) -> np.ndarray:
    """Replace a fraction of the labels of each class by wrong ones.

    Symmetric noise draws uniformly among the other classes, asymmetric noise takes the next class. The wrong labels are
    stratified: round(rate * count) of each class, so that no class loses its majority by chance.

    Args:
        labels: [N] int64 true labels in 0..num_classes-1.
        num_classes: number of classes C.
        noise: kind and rate.
        rng: source of randomness.

    Returns:
        Given labels, [N] int64.

    Raises:
        UserError: if there is only one class.
    """
    if num_classes < 2 and noise.rate > 0:
        raise UserError("--label-noise: needs at least two classes; this dataset has one.")
    given = labels.copy()
    for label in range(num_classes):
        samples = np.flatnonzero(labels == label)
        flipped = rng.permutation(samples)[: round(noise.rate * len(samples))]
        step = rng.integers(1, num_classes, len(flipped)) if noise.kind == "symmetric" else 1
        given[flipped] = (label + step) % num_classes
    return given


def mismatch_pairs(
    num_samples: int, rate: float, rng: np.random.Generator, classes: np.ndarray | None = None
) -> np.ndarray:
    """Choose the clip whose audio each clip gets: a derangement of a fraction of the clips, the identity elsewhere.

    Args:
        num_samples: number of clips N.
        rate: fraction of clips whose audio is swapped, 0..1.
        rng: source of randomness.
        classes: [N] int64; if given, swapped audio is always of another class than the video.

    Returns:
        `pair_id`, [N] int64: the clip whose audio is combined with the video of clip i.

    Raises:
        UserError: if more than half of the swapped clips are of one class, so that no such derangement exists.
    """
    pair = np.arange(num_samples)
    swapped = rng.permutation(num_samples)[: round(rate * num_samples)]
    if len(swapped) < 2:
        return pair
    # One random cycle through the swapped clips has no fixed point.
    pair[swapped] = np.roll(swapped, 1)
    if classes is None:
        return pair
    if 2 * np.bincount(classes[swapped]).max() > len(swapped):
        raise UserError(
            f"--cross-class-only: more than half of the {len(swapped)} clips to swap are of one class; omit the "
            "option, or balance the classes."
        )
    for clip in swapped[classes[pair[swapped]] == classes[swapped]]:
        if classes[pair[clip]] == classes[clip]:  # A previous exchange may have changed the pair.
            compatible = (classes[swapped] != classes[clip]) & (classes[pair[swapped]] != classes[clip])
            other = rng.choice(swapped[compatible])
            pair[[clip, other]] = pair[[other, clip]]
    return pair
