"""Fused attention operators of PyTorch that return the log-partition of the softmax.

The keys are split into parts, which the operators process in parallel, and the parts are merged.
Legend: B queries, n keys, P parts of the keys, D width, E excluded keys per query.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from distav.distributed.torch_internals import attend_cudnn, attend_flash_cpu, attend_flash_cuda, compiler_limits
from distav.memory.attention import TILE_KEYS, AttentionInputs, AttentionOutput, merge_parts, tiled_attention

AttentionFunction = Callable[[AttentionInputs], AttentionOutput]

_MAX_COMPILATIONS = 64
"""Number of forms of inputs to FlexAttention in a process: widths, numbers of excluded keys, with and without bias."""


def _over_parts(operator: AttentionFunction) -> AttentionFunction:
    """Build an attention function from an operator that attends over P equal parts of the keys at once.

    On a GPU, a thousand queries alone would occupy only eight of its 132 multiprocessors.

    Args:
        operator: takes queries [B, D], keys and values [P, n / P, D], bias [P, n / P] and the excluded keys of each
            part [P, B, E]; returns lse [P, B] and out [P, B, D].
    """

    @functools.wraps(operator)
    def attend(inputs: AttentionInputs) -> AttentionOutput:
        num_keys = len(inputs.keys)
        num_parts = _num_parts(inputs.queries, num_keys)
        part_size = num_keys // num_parts
        end = num_parts * part_size
        lse, out = operator(_split(inputs, num_parts, part_size))
        lse, out = lse.float(), out.float()
        if inputs.bias is not None:
            masked = inputs.bias[:end].view(num_parts, part_size).isneginf().all(1)
            lse = lse.masked_fill(masked[:, None], -torch.inf)
            out = out.masked_fill(masked[:, None, None], 0.0)
        if end < num_keys:
            last_lse, last_out = tiled_attention(_remainder(inputs, end))
            lse, out = torch.cat([lse, last_lse[None]]), torch.cat([out, last_out[None]])
        return merge_parts(lse, out)

    return attend


def _num_parts(queries: Tensor, num_keys: int) -> int:
    """Return the number of parts that occupies all cores, with at least `TILE_KEYS` keys per part."""
    if queries.is_cuda:
        num_workers = 2 * torch.cuda.get_device_properties(queries.device).multi_processor_count
        num_blocks = math.ceil(len(queries) / 128)
    else:
        num_workers, num_blocks = torch.get_num_threads(), math.ceil(len(queries) / 256)
    return max(1, min(math.ceil(num_workers / num_blocks), num_keys // TILE_KEYS))


def _split(inputs: AttentionInputs, num_parts: int, part_size: int) -> AttentionInputs:
    """Return the inputs over the first P * part_size keys, split into P parts."""
    end = num_parts * part_size
    keys = inputs.keys[:end].view(num_parts, part_size, -1)
    values = inputs.values[:end].view(num_parts, part_size, -1)
    bias = None if inputs.bias is None else inputs.bias[:end].view(num_parts, part_size)
    exclude = None
    if inputs.exclude is not None:
        exclude = inputs.exclude - torch.arange(0, end, part_size, device=keys.device)[:, None, None]
    return AttentionInputs(inputs.queries, keys, values, inputs.scale, bias, exclude)


def _remainder(inputs: AttentionInputs, start: int) -> AttentionInputs:
    """Return the inputs over the keys from `start` on."""
    bias = None if inputs.bias is None else inputs.bias[start:]
    exclude = None if inputs.exclude is None else inputs.exclude - start
    return AttentionInputs(inputs.queries, inputs.keys[start:], inputs.values[start:], inputs.scale, bias, exclude)


def _as_heads(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return queries, keys and values with the parts as heads, [1, P, ., D], and a scale that is a number.

    A scale that is a tensor is multiplied into the queries before they are rounded.
    """
    queries, scale = inputs.queries, inputs.scale
    if isinstance(scale, Tensor):
        queries, scale = queries.float() * scale, 1.0
    queries = queries.to(inputs.keys.dtype).expand(1, len(inputs.keys), -1, -1)
    return queries, inputs.keys[None], inputs.values[None], scale


@_over_parts
def flash_cpu(inputs: AttentionInputs) -> AttentionOutput:
    """Attend with FlashAttention for CPUs."""
    q, k, v, scale = _as_heads(inputs)
    mask = None if inputs.bias is None else inputs.bias[None, :, None].expand(-1, -1, q.shape[2], -1)
    out, lse = attend_flash_cpu(q, k, v, mask, scale)
    return lse[0], out[0]


@_over_parts
def flash_cuda(inputs: AttentionInputs) -> AttentionOutput:
    """Attend with FlashAttention for CUDA devices."""
    q, k, v, scale = _as_heads(inputs)
    out, lse = attend_flash_cuda(q.contiguous(), k, v, scale)
    return lse[0], out[0]


@_over_parts
def cudnn(inputs: AttentionInputs) -> AttentionOutput:
    """Attend with cuDNN."""
    q, k, v, scale = _as_heads(inputs)
    out, lse = attend_cudnn(q.contiguous(), k, v, scale)
    return lse.reshape(q.shape[1:3]), out[0]


@_over_parts
def flex(inputs: AttentionInputs) -> AttentionOutput:
    """Attend with FlexAttention, which applies bias and excluded keys inside its kernel; compiled on first use.

    FlexAttention is recompiled for every number of heads and for every scale that is a Python number, but not for the
    size of the batch. The parts are therefore passed as batches and the scale as a tensor.
    """
    keys, scale = inputs.keys, inputs.scale
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=keys.device)
    exclude = None if inputs.exclude is None else inputs.exclude.int()
    queries = inputs.queries.to(keys.dtype).expand(len(keys), 1, -1, -1).contiguous()
    lse, out = _compiled_flex()(queries, keys[:, None], inputs.values[:, None], scale, inputs.bias, exclude)
    return lse[:, 0], out[:, 0]


def _flex_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, exclude: Tensor | None
) -> AttentionOutput:
    def modify_score(score: Tensor, part: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        score = score * scale
        if bias is not None:
            score = score + bias[part, column]
        if exclude is not None:
            for entry in range(exclude.shape[2]):
                score = torch.where(exclude[part, row, entry] == column, -torch.inf, score)
        return score

    output: Any = flex_attention(
        queries,
        keys,
        values,
        score_mod=modify_score,
        scale=1.0,
        kernel_options={"BACKEND": "TRITON"},  # for few queries too, so that the kernel of the self-test is used
        return_aux=AuxRequest(lse=True),
    )
    return output[1].lse, output[0]


@functools.cache
def _compiled_flex() -> Callable[..., AttentionOutput]:
    # Without fullgraph, a graph break would run unfused and materialize the matrix of scores.
    compiled = torch.compile(_flex_attention, dynamic=True, fullgraph=True)

    @functools.wraps(compiled)
    def run(*arguments: Any) -> AttentionOutput:
        # By default a function is compiled at most eight times, and by a pool of processes on all cores, which takes
        # longer to start than this one kernel to compile.
        with compiler_limits(_MAX_COMPILATIONS, num_processes=1):
            return compiled(*arguments)

    return run
