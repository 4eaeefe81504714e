"""Softmax attention over many keys that also returns the log-partition of the softmax.

Legend: B queries, n keys, P parts of the keys, D width, E excluded keys per query.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_KEYS = 1024
"""Keys per tile of `tiled_attention` on a CPU, and the smallest part into which fused operators split the keys."""

_TILE_SCORES = 2**24
"""Scores per tile of `tiled_attention` on a GPU, where small tiles take longer to launch than to compute."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of an attention backend.

    Attributes:
        queries: [B, D].
        keys, values: [n, D].
        scale: factor of the dot products; a tensor has no dimensions and is on the device of the keys.
        bias: [n] added to the logits of each key, -inf to mask a key; or None.
        exclude: [B, E] int64 keys that are masked for a query, -1 for none; or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float | Tensor
    bias: Tensor | None = None
    exclude: Tensor | None = None


AttentionOutput = tuple[Tensor, Tensor]
"""lse [B], the log-partition, and out [B, D], the softmax-weighted average of the values; float32."""


def merge_parts(lse: Tensor, out: Tensor) -> AttentionOutput:
    """Merge the attention outputs over P parts of the keys.

    Args:
        lse: [P, B], -inf for a part whose keys are all masked.
        out: [P, B, D].

    Returns:
        lse [B] and out [B, D] over all keys.
    """
    if len(lse) == 1:
        return lse[0], out[0]
    max_lse = lse.amax(0)
    partition = (lse - max_lse.masked_fill(max_lse == -torch.inf, 0.0)).exp()
    total = partition.sum(0)
    weight = partition / total.clamp_min(_TINY)
    return max_lse + total.log(), torch.einsum("pb,pbd->bd", weight, out)


def tiled_attention(inputs: AttentionInputs, tile: int | None = None) -> AttentionOutput:
    """Attend tile by tile with plain PyTorch operators in float32.

    A running maximum of the logits keeps the exponentials finite at any temperature.

    Args:
        inputs: any inputs; this is the backend without restrictions.
        tile: keys per tile; chosen by device if None.
    """
    queries = inputs.queries.float() * inputs.scale
    if tile is None:
        tile = max(TILE_KEYS, _TILE_SCORES // max(1, len(queries))) if queries.is_cuda else TILE_KEYS
    max_logit = queries.new_full((len(queries),), -torch.inf)
    total = torch.zeros_like(max_logit)
    out = queries.new_zeros(len(queries), inputs.values.shape[1])
    buffer = queries.new_empty(len(queries) * min(tile, max(1, len(inputs.keys))))
    for start in range(0, len(inputs.keys), tile):
        logits = _tile_logits(queries, inputs, start, tile, buffer)
        new_max = torch.maximum(max_logit, logits.amax(1))
        anchor = new_max.masked_fill(new_max == -torch.inf, 0.0)
        logits.sub_(anchor[:, None]).exp_()
        decay = (max_logit - anchor).exp_()
        total.mul_(decay).add_(logits.sum(1))
        out.mul_(decay[:, None]).addmm_(logits, inputs.values[start : start + tile].float())
        max_logit = new_max
    return max_logit + total.log(), out.div_(total.clamp_min(_TINY)[:, None])


def _tile_logits(queries: Tensor, inputs: AttentionInputs, start: int, tile: int, buffer: Tensor) -> Tensor:
    """Return the logits of scaled queries over the keys of one tile, [B, <= tile], stored in `buffer`."""
    keys = inputs.keys[start : start + tile].float()
    logits = buffer[: len(queries) * len(keys)].view(len(queries), len(keys))
    torch.mm(queries, keys.T, out=logits)
    if inputs.bias is not None:
        logits += inputs.bias[start : start + tile]
    if inputs.exclude is not None:
        column = inputs.exclude - start
        outside = (column < 0) | (column >= len(keys))
        ceiling = torch.full_like(column, -torch.inf, dtype=logits.dtype).masked_fill_(outside, torch.inf)
        logits.scatter_reduce_(1, column.clamp(0, len(keys) - 1), ceiling, "amin")
    return logits


def reference_attention(inputs: AttentionInputs) -> AttentionOutput:
    """Compute the softmax in float64 from the full matrix of logits, [B, n]; the reference of tests and self-tests."""
    logits = inputs.queries.double() @ inputs.keys.double().T * inputs.scale
    if inputs.bias is not None:
        logits = logits + inputs.bias.double()
    if inputs.exclude is not None:
        row, entry = (inputs.exclude >= 0).nonzero(as_tuple=True)
        logits[row, inputs.exclude[row, entry]] = -torch.inf
    lse = logits.logsumexp(1)
    weight = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()
    return lse, weight @ inputs.values.double()
