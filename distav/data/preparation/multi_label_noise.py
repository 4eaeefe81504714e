"""Injection of missing and wrong labels into a multi-label dataset, to evaluate methods against known truth.

Legend: N clips, C classes.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from distav.config.errors import UserError


@dataclass(frozen=True)
class ClassRates:
    """A rate per class: evenly spaced from the first to the last class."""

    first: float
    last: float

    @classmethod
    def parse(cls, text: str, option: str) -> Self | None:
        """Parse `RATE`, the same for all classes, or `FIRST:LAST`; empty text means no noise.

        Args:
            text: the value of the option.
            option: its name, for error messages.

        Raises:
            UserError: for another form, or a rate outside 0..1.
        """
        if not text:
            return None
        try:
            rates = [float(part) for part in text.split(":")]
        except ValueError:
            rates = []
        if len(rates) not in (1, 2) or not all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates):
            raise UserError(
                f"{option}={text}: allowed: RATE for all classes, or FIRST:LAST for rates evenly spaced from the first "
                "to the last class, each from 0 to 1."
            )
        return cls(rates[0], rates[-1])

    def of_classes(self, num_classes: int) -> np.ndarray:
        """Return the rate of each class, [C]."""
        return np.linspace(self.first, self.last, num_classes)


def corrupt_labels(
    true: np.ndarray, missing: ClassRates | None, wrong: ClassRates | None, rng: np.random.Generator
) -> np.ndarray:
    """Remove a fraction of the labels of each class, and add the class to a fraction of the clips without it.

    The numbers are exact: of a class with n clips, round(rate * n) lose the label.

    Args:
        true: [N, C] bool true labels.
        missing: P(label is missing | the class is present), by class.
        wrong: P(label is given | the class is absent), by class.
        rng: source of randomness.

    Returns:
        Given labels, [N, C] bool.
    """
    given = true.copy()
    num_classes = true.shape[1]
    for present, rates in ((True, missing), (False, wrong)):
        if rates is None:
            continue
        for column, rate in enumerate(rates.of_classes(num_classes)):
            clips = np.flatnonzero(true[:, column] == present)
            changed = rng.permutation(clips)[: round(rate * len(clips))]
            given[changed, column] = not present
    return given


def multi_label_rates(true: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """Return the rates of missing and of wrong labels over all classes; a rate without clips is 0."""
    missing, wrong = (true & ~given).sum(), (given & ~true).sum()
    return {
        "missing_label_rate": float(missing / max(1, true.sum())),
        "wrong_label_rate": float(wrong / max(1, (~true).sum())),
    }
