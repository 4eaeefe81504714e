"""Random numbers that hang on a sample, not on the rank or the batch that it comes in.

A counter-based generator after SplitMix64 (Steele et al. 2014), in wrapping 64-bit integers: the same numbers on any
device and for any number of ranks.
"""

import torch
from torch import Tensor

_GAMMA = -7046029254386353131
_MIX1 = -4658895280553007687
_MIX2 = -7723592293110705685


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _MIX1
    values = (values ^ _shifted(values, 27)) * _MIX2
    return values ^ _shifted(values, 31)


def sample_seeds(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """Return a seed for each sample of an epoch: ids [b] int64 -> [b] int64."""
    start = _mixed(torch.full_like(ids, seed) * _GAMMA + epoch)
    return _mixed(start + (ids + 1) * _GAMMA)


def uniform(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each seed: [b] int64 -> [b, count] float32.

    Args:
        seeds: one seed a row.
        stream: tells apart the uses that a model makes of one seed.
        count: numbers wanted for each row.
    """
    counter = torch.arange(1, count + 1, device=seeds.device) + (stream << 32)
    bits = _mixed(_mixed(seeds)[:, None] + counter[None, :] * _GAMMA)
    return _shifted(bits, 40).float() / (1 << 24)
