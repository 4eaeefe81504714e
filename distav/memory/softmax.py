"""Exact softmax over every row of the sharded bank, without a matrix of logits.

Bank rows get no gradient, so the softmax of a query over all rows is one attention pass with the rows as keys and
values: it returns the log-partition `lse` and the expected row `out = sum_j P_j value_j`, from which both a loss and
its gradient follow. Chunks and ranks are merged by the same rule. Legend: B queries, n rows, D width.
"""

import torch
from torch import Tensor

from distav.world import max_, num_ranks, sum_

TILE = 4096
"""Rows scored at a time."""


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: float,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """Softmax-average the values of this rank's rows in one pass, in float32, O(B * tile) memory.

    Args:
        queries: [B, D].
        keys: [n, D].
        values: [n, D].
        temperature: divides the dot products.
        bias: [n] added to the logits of each row; -inf leaves a row out.
        exclude: [B] int64 row that a query must not see, or -1.
        tile: rows scored at a time.

    Returns:
        lse [B] (-inf where no row is seen) and out [B, D].
    """
    queries = queries.float() / temperature
    top = queries.new_full((len(queries),), -torch.inf)
    total = torch.zeros_like(top)
    out = queries.new_zeros(len(queries), values.shape[1])
    for start in range(0, len(keys), tile):
        logits = queries @ keys[start : start + tile].float().T
        if bias is not None:
            logits += bias[start : start + tile]
        if exclude is not None:
            column = exclude - start
            hit = (column >= 0) & (column < logits.shape[1])
            logits[hit.nonzero().squeeze(1), column[hit]] = -torch.inf
        higher = torch.maximum(top, logits.amax(1))
        anchor = higher.masked_fill(higher == -torch.inf, 0.0)
        logits.sub_(anchor[:, None]).exp_()
        keep = (top - anchor).exp()
        total = total * keep + logits.sum(1)
        out = torch.addmm(out * keep[:, None], logits, values[start : start + tile].float())
        top = higher
    return top + total.log(), out / total.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def merge_across_ranks(lse: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Merge what every rank found over its own rows: lse [B], out [B, D] -> the same over all rows."""
    if num_ranks() == 1:
        return lse, out
    top = max_(lse.clone())
    anchor = top.masked_fill(top == -torch.inf, 0.0)
    share = (lse - anchor).exp()
    both = sum_(torch.cat([share[:, None], out * share[:, None]], dim=1))
    total = both[:, 0]
    return anchor + total.log(), both[:, 1:] / total.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
