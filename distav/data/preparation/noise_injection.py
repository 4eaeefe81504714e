"""Noise injected on purpose, so that a method can be judged: wrong labels and mismatched pairs.

Both are drawn from a seed and written into the set as facts (`true_label`, `pair_id`), never drawn again.
"""

import math
from dataclasses import dataclass

import numpy as np

from distav.config.errors import UserError, did_you_mean

_KINDS = ("symmetric", "asymmetric")


@dataclass(frozen=True)
class LabelNoise:
    """Kind and rate of label noise."""

    kind: str
    rate: float

    @classmethod
    def parse(cls, text: str, option: str = "--label-noise") -> "LabelNoise | None":
        """Read `symmetric:0.4` or `asymmetric:0.4`; empty text means no noise.

        Raises:
            UserError: for another kind, or a rate outside 0..1.
        """
        if not text:
            return None
        kind, _, rate = text.partition(":")
        if kind not in _KINDS:
            raise UserError(f"{option}={text}: write symmetric:RATE or asymmetric:RATE.{did_you_mean(kind, _KINDS)}")
        try:
            value = float(rate)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise UserError(f"{option}={text}: the rate has to be a number from 0 to 1.")
        return cls(kind, value)


def flip_labels(labels: np.ndarray, num_classes: int, noise: LabelNoise, rng: np.random.Generator) -> np.ndarray:
    """Give a share of each class a wrong label.

    Symmetric noise draws uniformly among the other classes, asymmetric noise takes the next class. The flips are
    stratified: round(rate * count) of every class, so that no class loses its majority by chance.

    Args:
        labels: [N] int64 true labels, 0..num_classes-1.
        num_classes: classes C.
        noise: kind and rate.
        rng: source of randomness.

    Returns:
        [N] int64 given labels.
    """
    if num_classes < 2 and noise.rate > 0:
        raise UserError("label noise needs at least two classes; this set has one.")
    given = labels.copy()
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        chosen = rng.permutation(members)[: round(noise.rate * len(members))]
        step = rng.integers(1, num_classes, len(chosen)) if noise.kind == "symmetric" else 1
        given[chosen] = (label + step) % num_classes
    return given


def mismatch_pairs(
    num_samples: int, rate: float, rng: np.random.Generator, classes: np.ndarray | None = None
) -> np.ndarray:
    """Choose whose sound each clip gets: a derangement among a share of the clips, the identity elsewhere.

    Args:
        num_samples: clips N.
        rate: share of clips whose sound is swapped, 0..1.
        rng: source of randomness.
        classes: [N] where every swapped sound has to be of another class than the picture.

    Returns:
        [N] int64 `pair_id`: the clip whose sound goes with clip i's picture.

    Raises:
        UserError: where one class has more than half of the chosen clips, so that it cannot be done.
    """
    pair = np.arange(num_samples)
    chosen = rng.permutation(num_samples)[: round(rate * num_samples)]
    if len(chosen) < 2:
        return pair
    # One random cycle through the chosen clips has no fixed point.
    pair[chosen] = np.roll(chosen, 1)
    if classes is None:
        return pair
    if 2 * np.bincount(classes[chosen]).max() > len(chosen):
        raise UserError(
            f"--cross-class-only: one class has more than half of the {len(chosen)} clips that are to be swapped; leave the "
            "option out, or make the classes more even."
        )
    for clip in chosen[classes[pair[chosen]] == classes[chosen]]:
        if classes[pair[clip]] == classes[clip]:  # A swap before may have mended this one too.
            fits = (classes[chosen] != classes[clip]) & (classes[pair[chosen]] != classes[clip])
            other = rng.choice(chosen[fits])
            pair[[clip, other]] = pair[[other, clip]]
    return pair
