"""Exact softmax over every row of the bank, without a matrix of logits.

Bank rows get no gradient, so the softmax of a query over all rows is one attention pass with the rows as keys and
values: it returns the log-partition `lse` and the expected row `out = sum_j P_j value_j`, from which both a loss and
its gradient follow. Parts of a shard and shards of ranks are merged by the same rule.
Legend: b queries of this rank, B of all ranks, n rows of this rank, D width.
"""

import torch
from torch import Tensor

from distav.distributed.collectives import all_to_all_rows, get_world_size
from distav.memory.attention import AttentionInputs, merge_parts
from distav.memory.attention_backends import BACKENDS, AttentionBackend, select_backend


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: float | Tensor,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """Softmax-average the values of this rank's rows in one pass of 4 B n D operations, in O(B D) memory.

    Args:
        queries: [B, D].
        keys: [n, D] float32, or bfloat16 on a GPU, where it is several times as fast; sums are in float32.
        values: [n, D] of the same dtype.
        temperature: divides the dot products; a tensor has no dimensions, is taken to be positive and stays on its
            device.
        bias: [n] added to the logits of each row; -inf leaves a row out.
        exclude: [B] or [B, E] int64 rows that a query must not see, or -1.
        back_end: name of a back end in `distav.memory.attention_backends`; the best one where empty.

    Returns:
        lse [B] (-inf where no row is seen) and out [B, D], float32.

    Raises:
        ValueError: for a temperature that is not positive, or a back end that cannot do this.
    """
    learnt = isinstance(temperature, Tensor)
    if not learnt and not temperature > 0:
        raise ValueError(f"temperature={temperature:g} must be above 0")
    if not keys.is_cuda and keys.dtype is torch.bfloat16:  # CPUs multiply bfloat16 a hundred times as slowly.
        keys, values = keys.float(), values.float()
    if exclude is not None and exclude.dim() == 1:
        exclude = exclude[:, None]
    bias = None if bias is None else bias.float()
    scale = temperature.detach().float().reciprocal() if learnt else 1 / temperature
    asked = AttentionInputs(queries.detach(), keys, values, scale, bias, exclude)
    chosen = _named(backend, asked) if backend else select_backend(asked)
    return chosen.run(asked)


def _named(name: str, asked: AttentionInputs) -> AttentionBackend:
    for each in BACKENDS:
        if each.name == name and each.supports(asked):
            return each
    able = [each.name for each in BACKENDS if each.supports(asked)]
    raise ValueError(f"back_end={name} cannot do this here; these can: {', '.join(able)}")


def merge_across_ranks(found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Merge what every rank found over its own rows, each rank for its own queries.

    Args:
        found: lse [B] and out [B, D] of the queries of all ranks over this rank's rows, once for each softmax.

    Returns:
        lse [b] and out [b, D] of this rank's queries over all rows. All of it takes one exchange, in which a rank
        sends (W - 1) b (D + 1) numbers for each softmax.
    """
    ranks = get_world_size()
    if ranks == 1:
        return found
    packed = torch.stack([torch.cat([lse[:, None], out], dim=1) for lse, out in found], dim=1)
    parts = all_to_all_rows(packed).view(ranks, -1, *packed.shape[1:])
    return [merge_parts(parts[:, :, each, 0], parts[:, :, each, 1:]) for each in range(len(found))]
