"""Learning rate schedule: linear warmup, then cosine decay."""

import math


def lr_factor(progress: float, warmup_fraction: float, min_fraction: float) -> float:
    """Return the factor on the learning rate at a progress of the phase, 0..1.

    Args:
        progress: fraction of the steps done.
        warmup_fraction: fraction of the steps with linear warmup.
        min_fraction: factor at the end of the cosine decay.
    """
    if progress < warmup_fraction:
        return progress / warmup_fraction
    decay = (progress - warmup_fraction) / max(1 - warmup_fraction, 1e-9)
    return min_fraction + (1 - min_fraction) * (1 + math.cos(math.pi * min(1.0, decay))) / 2
