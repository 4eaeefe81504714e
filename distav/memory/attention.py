"""Attention over many keys that also returns the log-partition of the softmax.

Legend: B queries, n keys, P parts of the keys, D width, E excluded keys of a query.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 1024
"""Keys scored at a time by the tiles on a CPU, and the fewest of a part."""


_TILE_SCORES = 2**24
"""Scores that the tiles compute at a time on a GPU, where a small tile would cost more to launch than to compute."""


@dataclass(frozen=True)
class AttentionInputs:
    """What a back end is asked for.

    Attributes:
        queries: [B, D].
        keys, values: [n, D].
        scale: factor on the dot products; a tensor has no dimensions and is on the device of the keys.
        bias: [n] added to the logits of a key, -inf to leave it out; or None.
        exclude: [B, E] int64 keys that a query must not see, -1 for none; or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float | Tensor
    bias: Tensor | None = None
    exclude: Tensor | None = None


AttentionOutput = tuple[Tensor, Tensor]
"""lse [B] and out [B, D], float32."""


def merge_parts(lse: Tensor, out: Tensor) -> AttentionOutput:
    """Merge what was found over P parts of the keys: lse [P, B], out [P, B, D] -> [B], [B, D].

    A part that saw nothing has lse -inf.
    """
    if len(lse) == 1:
        return lse[0], out[0]
    top = lse.amax(0)
    share = (lse - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = share.sum(0)
    weight = share / total.clamp_min(torch.finfo(torch.float32).tiny)
    return top + total.log(), torch.einsum("pb,pbd->bd", weight, out)


def tiled_attention(asked: AttentionInputs, tile: int | None = None) -> AttentionOutput:
    """Attend tile by tile in plain PyTorch, in float32; the running maximum keeps any temperature safe."""
    queries = asked.queries.float() * asked.scale
    if tile is None:
        tile = max(TILE, _TILE_SCORES // max(1, len(queries))) if queries.is_cuda else TILE
    top = queries.new_full((len(queries),), -torch.inf)
    total = torch.zeros_like(top)
    out = queries.new_zeros(len(queries), asked.values.shape[1])
    space = queries.new_empty(len(queries) * min(tile, max(1, len(asked.keys))))
    for start in range(0, len(asked.keys), tile):
        keys, values = (each[start : start + tile].float() for each in (asked.keys, asked.values))
        area = space[: len(queries) * len(keys)].view(len(queries), len(keys))
        logits = torch.mm(queries, keys.T, out=area)
        if asked.bias is not None:
            logits += asked.bias[start : start + tile]
        if asked.exclude is not None:
            column = asked.exclude - start
            outside = (column < 0) | (column >= len(keys))
            hidden = torch.full_like(column, -torch.inf, dtype=logits.dtype).masked_fill_(outside, torch.inf)
            logits.scatter_reduce_(1, column.clamp(0, len(keys) - 1), hidden, "amin")
        higher = torch.maximum(top, logits.amax(1))
        anchor = higher.masked_fill(higher == -torch.inf, 0.0)
        logits.sub_(anchor[:, None]).exp_()
        keep = (top - anchor).exp_()
        total.mul_(keep).add_(logits.sum(1))
        out.mul_(keep[:, None]).addmm_(logits, values)
        top = higher
    return top + total.log(), out.div_(total.clamp_min(torch.finfo(torch.float32).tiny)[:, None])


def reference_attention(asked: AttentionInputs) -> AttentionOutput:
    """Write the softmax out in float64; B x n memory, for comparison."""
    logits = asked.queries.double() @ asked.keys.double().T * asked.scale
    if asked.bias is not None:
        logits = logits + asked.bias.double()
    if asked.exclude is not None:
        row, entry = (asked.exclude >= 0).nonzero(as_tuple=True)
        logits[row, asked.exclude[row, entry]] = -torch.inf
    lse = logits.logsumexp(1)
    weight = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()
    return lse, weight @ asked.values.double()
