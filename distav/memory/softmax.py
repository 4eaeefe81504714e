"""Exact softmax over all rows of the memory bank without a matrix of logits.

The rows of the bank receive no gradient. The softmax of a query over all rows is therefore one attention pass with
the rows as keys and values: it returns the log-partition `lse` and the expected row `out = sum_j P_j value_j`, from
which the loss and its gradient follow. Parts of a shard and shards of several ranks are merged by the same rule.
Legend: b queries of this rank, B of all ranks, n rows of this rank, D width.
"""

import torch
from torch import Tensor

from distav.distributed.collectives import all_to_all_rows, get_world_size
from distav.memory.attention import AttentionInputs, AttentionOutput, merge_parts
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
) -> AttentionOutput:
    """Average the values of this rank's rows by the softmax of the queries.

    One pass of 4 B n D operations in O(B D) memory.

    Args:
        queries: [B, D].
        keys: [n, D] float32, or bfloat16 on a GPU, which is several times as fast; sums are in float32.
        values: [n, D] of the same dtype.
        temperature: divisor of the dot products; a tensor has no dimensions, is assumed to be positive and stays on
            its device.
        bias: [n] added to the logits of each row; -inf masks a row.
        exclude: [B] or [B, E] int64 rows that are masked for a query, -1 for none.
        backend: name of a backend in `distav.memory.attention_backends`; selected by the inputs if empty.

    Returns:
        lse [B] (-inf where all rows are masked) and out [B, D], float32.

    Raises:
        ValueError: if the temperature is not positive or the named backend does not support the inputs.
    """
    learnable = isinstance(temperature, Tensor)
    if not learnable and not temperature > 0:
        raise ValueError(f"temperature={temperature:g} must be above 0")
    if not keys.is_cuda and keys.dtype is torch.bfloat16:  # CPUs multiply bfloat16 a hundred times as slowly.
        keys, values = keys.float(), values.float()
    if exclude is not None and exclude.dim() == 1:
        exclude = exclude[:, None]
    bias = None if bias is None else bias.float()
    scale = temperature.detach().float().reciprocal() if learnable else 1 / temperature
    inputs = AttentionInputs(queries.detach(), keys, values, scale, bias, exclude)
    selected = _find_backend(backend, inputs) if backend else select_backend(inputs)
    return selected.run(inputs)


def _find_backend(name: str, inputs: AttentionInputs) -> AttentionBackend:
    supported = {backend.name: backend for backend in BACKENDS if backend.supports(inputs)}
    if name not in supported:
        raise ValueError(f"backend={name} does not support these inputs; supported: {', '.join(supported)}")
    return supported[name]


def merge_across_ranks(outputs: list[AttentionOutput]) -> list[AttentionOutput]:
    """Merge the attention outputs over the rows of each rank into outputs over all rows.

    Args:
        outputs: for each softmax, lse [B] and out [B, D] of the queries of all ranks over this rank's rows.

    Returns:
        For each softmax, lse [b] and out [b, D] of this rank's queries over all rows. One exchange serves all of
        them; a rank sends (W - 1) b (D + 1) numbers per softmax.
    """
    world_size = get_world_size()
    if world_size == 1:
        return outputs
    packed = torch.stack([torch.cat([lse[:, None], out], dim=1) for lse, out in outputs], dim=1)
    parts = all_to_all_rows(packed).view(world_size, -1, *packed.shape[1:])
    return [merge_parts(parts[:, :, number, 0], parts[:, :, number, 1:]) for number in range(len(outputs))]
