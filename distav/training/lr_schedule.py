"""Learning rate schedule."""

import math


def learning_rate(progress: float, warmup: float, floor: float) -> float:
    """Return the factor on the learning rate: a linear rise, then a cosine down to `floor`; progress is 0..1."""
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / max(1 - warmup, 1e-9)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2
