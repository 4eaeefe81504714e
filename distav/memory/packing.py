"""Scores packed into integers with the id or position of their key, so that one sort orders by both."""

import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min
"""Packed value of a neighbor that does not exist; sorts below every score."""

LOWEST = torch.finfo(torch.float32).min
"""Score that every finite score reaches and the -inf of an excluded pair does not."""

_ROWS = 4096
"""Rows that are unpacked at a time."""


def pack(scores: Tensor, ids: Tensor) -> Tensor:
    """Pack float32 scores and ids into int64 values; descending values are ordered by score, then by ascending id."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, ~bits ^ torch.iinfo(torch.int32).min, bits).long()
    return (ordered << 32) | (0xFFFFFFFF - ids)


def unpack_scores(values: Tensor) -> Tensor:
    """Return the scores of values returned by `pack`."""
    ordered = (values >> 32).int()
    bits = torch.where(ordered < 0, ~(ordered ^ torch.iinfo(torch.int32).min), ordered)
    return bits.view(torch.float32)


def unpack_ids(values: Tensor) -> Tensor:
    """Return the ids of values returned by `pack`."""
    return 0xFFFFFFFF - (values & 0xFFFFFFFF)


def unpack(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [q, k] int64 and scores [q, k] float32 of packed values; -1 and 0 where a value is `EMPTY`."""
    missing = values == EMPTY
    return unpack_ids(values).masked_fill_(missing, -1), unpack_scores(values).masked_fill_(missing, 0.0)


def unpack_in_place(values: Tensor) -> tuple[Tensor, Tensor]:
    """Replace packed values by ids [q, k] int32 and scores [q, k] float32, which share their memory; see `unpack`."""
    low, high = values.view(torch.int32).view(*values.shape, 2).unbind(2)
    for start in range(0, len(values), _ROWS):
        part = slice(start, start + _ROWS)
        ids, scores = unpack(values[part])
        low[part], high[part] = ids, scores.view(torch.int32)
    return low, values.view(torch.float32).view(*values.shape, 2)[..., 1]


def score_or_lowest(values: Tensor) -> Tensor:
    """Return the scores of values returned by `pack`, `LOWEST` where a value is `EMPTY`."""
    return unpack_scores(values).masked_fill(values == EMPTY, LOWEST)


def pack_coarse(scores: Tensor, positions: Tensor) -> Tensor:
    """Pack 16-bit floating-point scores and 32-bit positions of keys into the lower 48 bits of int64 values.

    Their ascending order is by descending score, then by position.
    """
    bits = scores.view(torch.int16).long()
    ordered = torch.where(bits < 0, -0x8000 - bits, bits)
    return ((0x7FFF - ordered) << 32) + positions


def unpack_coarse_scores(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scores of values returned by `pack_coarse`, in their 16-bit dtype."""
    ordered = 0x7FFF - ((values >> 32) & 0xFFFF)
    bits = torch.where(ordered < 0, -0x8000 - ordered, ordered).to(torch.int16)
    return bits.view(dtype)
