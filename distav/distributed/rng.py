"""Random numbers that depend on the sample, not on the rank or the batch that processes it.

Counter-based generator after SplitMix64 (Steele et al. 2014) in wrapping 64-bit integers: the numbers are the same on
any device and for any number of ranks.
"""

import torch
from torch import Tensor

_GAMMA = -7046029254386353131
_MIX1 = -4658895280553007687
_MIX2 = -7723592293110705685


def _logical_shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift right without sign extension."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _logical_shift_right(values, 30)) * _MIX1
    values = (values ^ _logical_shift_right(values, 27)) * _MIX2
    return values ^ _logical_shift_right(values, 31)


def sample_seeds(seed: int, epoch: int | Tensor, ids: Tensor) -> Tensor:
    """Return one seed per sample and epoch: ids [b] int64, and one epoch or [b] int64 epochs -> [b] int64."""
    start = _mix(torch.full_like(ids, seed) * _GAMMA + epoch)
    return _mix(start + (ids + 1) * _GAMMA)


def uniform(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Return uniform random numbers in [0, 1): seeds [b] int64 -> [b, count] float32.

    Args:
        seeds: [b] int64, one per row.
        stream: number that distinguishes the uses of one seed within a model.
        count: numbers per row.
    """
    counter = torch.arange(1, count + 1, device=seeds.device) + (stream << 32)
    bits = _mix(_mix(seeds)[:, None] + counter[None, :] * _GAMMA)
    return _logical_shift_right(bits, 40).float() / (1 << 24)
