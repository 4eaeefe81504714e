"""Class-balanced sampling: how often each sample is drawn in an epoch (Kang et al. 2020, section 4.1).

Legend: N samples, n_c samples of class c.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ClassBalance:
    """Sampling in which class c is drawn with probability proportional to n_c^(1 - strength).

    Attributes:
        classes: [N] int64 class of each sample.
        strength: 0 is instance-balanced sampling, 0.5 square-root sampling, 1 class-balanced sampling.
    """

    classes: NDArray[np.int64]
    strength: float

    @cached_property
    def rates(self) -> NDArray[np.float64]:
        """Expected draws of each sample in an epoch of N draws: [N], sum N."""
        counts = np.bincount(self.classes).tolist()
        # Rounded to float32, so that the weights do not depend on the last bit of a processor's power function.
        weights = np.array([count**-self.strength if count else 0.0 for count in counts], np.float32)
        weight = weights[self.classes].astype(np.float64)
        return weight * (len(weight) / np.cumsum(weight)[-1])

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return how often each sample is drawn in an epoch: [N], sum N.

        The expected number is rounded up or down at random by systematic sampling, both for each sample and for each
        class: their sampling noise is that of less than one draw.
        """
        shuffled = rng.permutation(len(self.classes))
        order = shuffled[np.argsort(self.classes[shuffled], kind="stable")]
        ends = np.minimum(np.floor(np.cumsum(self.rates[order]) + rng.uniform()), len(order)).astype(np.int64)
        ends[-1] = len(order)
        draws = np.empty(len(order), np.int64)
        draws[order] = np.diff(ends, prepend=0)
        return draws
