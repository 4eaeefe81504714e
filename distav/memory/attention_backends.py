"""Back ends that attend over keys in one pass and return the log-partition of the softmax with its average.

The fused attention operators of PyTorch that tell the log-sum-exp are private, so each is tried on a small problem
before its first use; where one is missing or wrong the next in the list serves, and the log says why.
Legend: B queries, n keys, P parts of the keys, D width, E excluded keys of a query.
"""

import functools
import logging
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from distav.memory.attention import (
    TILE,
    AttentionInputs,
    AttentionOutput,
    merge_parts,
    reference_attention,
    tiled_attention,
)

log = logging.getLogger("distav")


def _fused(run: Callable[[AttentionInputs], AttentionOutput]) -> Callable[[AttentionInputs], AttentionOutput]:
    """Make a back end of an operator that attends over P parts of the keys at once.

    On a GPU a thousand queries alone would fill eight of its 132 multiprocessors.

    Args:
        run: takes queries [B, D], keys and values [P, n / P, D], bias [P, n / P] and the excluded keys of each part
            [P, B, E]; returns lse [P, B] and out [P, B, D].
    """

    def attend(asked: AttentionInputs) -> AttentionOutput:
        num_keys = len(asked.keys)
        parts = _num_parts(asked.queries, num_keys)
        length = num_keys // parts
        cut = parts * length
        keys, values = (each[:cut].view(parts, length, -1) for each in (asked.keys, asked.values))
        bias = None if asked.bias is None else asked.bias[:cut].view(parts, length)
        exclude = None
        if asked.exclude is not None:
            exclude = asked.exclude - torch.arange(0, cut, length, device=keys.device)[:, None, None]
        lse, out = run(AttentionInputs(asked.queries, keys, values, asked.scale, bias, exclude))
        lse, out = lse.float(), out.float()
        if bias is not None:
            blind = bias.isneginf().all(1)
            lse = lse.masked_fill(blind[:, None], -torch.inf)
            out = out.masked_fill(blind[:, None, None], 0.0)
        if cut < num_keys:
            tail = None if asked.bias is None else asked.bias[cut:]
            hidden = None if asked.exclude is None else asked.exclude - cut
            last = tiled_attention(
                AttentionInputs(asked.queries, asked.keys[cut:], asked.values[cut:], asked.scale, tail, hidden)
            )
            lse, out = torch.cat([lse, last[0][None]]), torch.cat([out, last[1][None]])
        return merge_parts(lse, out)

    return attend


def _num_parts(queries: Tensor, num_keys: int) -> int:
    """Return how many parts of the keys it takes to give every core work, at least 1,024 keys each."""
    if queries.is_cuda:
        wanted = 2 * torch.cuda.get_device_properties(queries.device).multi_processor_count
        blocks = math.ceil(len(queries) / 128)
    else:
        wanted, blocks = torch.get_num_threads(), math.ceil(len(queries) / 256)
    return max(1, min(math.ceil(wanted / blocks), num_keys // TILE))


def _as_heads(asked: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return queries, keys and values with the parts in the place of heads, [1, P, ., D], and a scale that is a number.

    A scale on the device goes into the queries, before they are rounded.
    """
    queries, scale = asked.queries, asked.scale
    if isinstance(scale, Tensor):
        queries, scale = queries.float() * scale, 1.0
    queries = queries.to(asked.keys.dtype).expand(1, len(asked.keys), -1, -1)
    return queries, asked.keys[None], asked.values[None], scale


def _flash_cpu(asked: AttentionInputs) -> AttentionOutput:
    q, k, v, scale = _as_heads(asked)
    mask = None if asked.bias is None else asked.bias[None, :, None].expand(-1, -1, q.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return lse[0], out[0]


def _flash_gpu(asked: AttentionInputs) -> AttentionOutput:
    q, k, v, scale = _as_heads(asked)
    found = torch.ops.aten._scaled_dot_product_flash_attention(q.contiguous(), k, v, scale=scale)
    return found[1][0], found[0][0]


def _cudnn(asked: AttentionInputs) -> AttentionOutput:
    q, k, v, scale = _as_heads(asked)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q.contiguous(), k, v, None, True, scale=scale)
    return found[1].reshape(q.shape[1:3]), found[0][0]


def _flex(asked: AttentionInputs) -> AttentionOutput:
    """FlexAttention: compiled on first use, takes bias and excluded keys inside the kernel.

    It is compiled for each number of heads, but for any number of batches, so the parts take the place of batches;
    and for each number that is its scale, so the scale is a tensor.
    """
    keys, scale = asked.keys, asked.scale
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=keys.device)
    exclude = None if asked.exclude is None else asked.exclude.int()
    queries = asked.queries.to(keys.dtype).expand(len(keys), 1, -1, -1).contiguous()
    lse, out = _compiled_flex()(queries, keys[:, None], asked.values[:, None], scale, asked.bias, exclude)
    return lse[:, 0], out[:, 0]


def _flex_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, exclude: Tensor | None
) -> AttentionOutput:
    def modified(score: Tensor, part: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        del head
        score = score * scale
        if bias is not None:
            score = score + bias[part, column]
        if exclude is not None:
            for entry in range(exclude.shape[2]):
                score = torch.where(exclude[part, row, entry] == column, -torch.inf, score)
        return score

    found: Any = flex_attention(
        queries,
        keys,
        values,
        score_mod=modified,
        scale=1.0,
        kernel_options={"BACKEND": "TRITON"},  # for few queries too, so that one kernel is tried and used
        return_aux=AuxRequest(lse=True),
    )
    return found[1].lse, found[0]


@functools.cache
def _compiled_flex() -> Callable[..., AttentionOutput]:
    # The whole graph, since what is left out of it runs unfused, with a matrix of scores.
    return torch.compile(_flex_attention, dynamic=True, fullgraph=True)


@dataclass(frozen=True)
class AttentionBackend:
    """One way to attend, and what it can take.

    Attributes:
        name: what it is called in `attend` and in the log.
        run: computes the softmax.
        device: type of the device that it needs; any where empty.
        dtypes: of the keys.
        takes_bias, takes_exclude: whether it can add a bias and leave out excluded keys.
        widths: range of D.
        fewest_keys: n from which on it can be used.
    """

    name: str
    run: Callable[[AttentionInputs], AttentionOutput]
    device: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    takes_bias: bool = True
    takes_exclude: bool = True
    widths: range = range(1, 2**20)
    min_keys: int = 0

    def unsupported_reason(self, asked: AttentionInputs) -> str:
        """Return why it cannot do what is asked, or nothing where it can.

        The fused operators check little of this by themselves: the rest is checked where PyTorch chooses among them,
        in `sdp_utils.cpp`.
        """
        keys, values, width = asked.keys, asked.values, asked.keys.shape[1]
        if self.device not in ("", keys.device.type):
            return f"needs {self.device}"
        if keys.dtype not in self.dtypes:
            return f"takes no {_named(keys.dtype)}"
        if asked.bias is not None and not self.takes_bias:
            return "takes no bias"
        if asked.exclude is not None and not self.takes_exclude:
            return "takes no excluded keys"
        if width not in self.widths:
            return f"takes widths from {self.widths[0]} to {self.widths[-1]} in steps of {self.widths.step}"
        if len(keys) < self.min_keys:
            return f"takes no fewer than {self.min_keys} keys"
        if self.device and keys.shape != values.shape:
            return "takes values only as wide as keys"
        if self.device == "cuda" and not (_aligned(keys) and _aligned(values)):
            return "takes only rows that begin at multiples of 16 bytes"
        return ""

    def supports(self, asked: AttentionInputs) -> bool:
        """Whether it can do what is asked, here."""
        return not self.unsupported_reason(asked)


def _aligned(rows: Tensor) -> bool:
    """Whether rows can be loaded 16 bytes at a time."""
    begins = rows.storage_offset(), rows.stride(0)
    return rows.stride(1) == 1 and all(each * rows.element_size() % 16 == 0 for each in begins)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_HALF = (torch.bfloat16,)
BACKENDS = (
    AttentionBackend("cudnn", _fused(_cudnn), "cuda", _HALF, False, False, range(8, 129, 8), min_keys=2),
    AttentionBackend("flash", _fused(_flash_gpu), "cuda", _HALF, False, False, range(8, 257, 8), min_keys=1),
    AttentionBackend("flex", _fused(_flex), "cuda", _HALF, widths=range(16, 257, 8), min_keys=1),
    AttentionBackend(
        "flash-cpu", _fused(_flash_cpu), "cpu", (torch.float32,), True, False, range(8, 2**20, 8), min_keys=1
    ),
    AttentionBackend("tiles", tiled_attention),
)
"""In order of preference."""


@functools.cache
def self_test(back_end: AttentionBackend, device: torch.device, width: int, with_bias: bool, num_excluded: int) -> str:
    """Return what is wrong with a back end here, on 300 queries and 2,500 keys; nothing where its answer is right.

    Args:
        back_end: the one to try, in the first of its dtypes.
        device: where to try it.
        width: D.
        with_bias: whether there is a bias.
        num_excluded: E, 0 for none.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2800, width, generator=generator), dim=1)
    dtype = back_end.dtypes[0]
    queries, keys = rows[:300].to(device, dtype), rows[300:].to(device, dtype)
    bias = torch.linspace(-1, 1, 2500, device=device) if with_bias else None
    exclude = torch.arange(300 * num_excluded, device=device).view(300, -1) % 2500 if num_excluded else None
    asked = AttentionInputs(queries, keys, keys, 10.0, bias, exclude)
    close, fault = 1e-4 if dtype is torch.float32 else 2e-2, ""
    try:
        found = back_end.run(asked)
        errors = [
            float((ours - true).abs().max()) for ours, true in zip(found, reference_attention(asked), strict=True)
        ]
        if not all(each < close for each in errors):
            fault = f"lse off by {errors[0]:.2g}, average by {errors[1]:.2g}; allowed: {close:g}"
    except Exception as error:  # noqa: BLE001  # whatever a private operator raises, it cannot be used
        fault = f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"
    if fault:
        log.warning("attention back end %s failed its probe on %s, width %d: %s", back_end.name, device, width, fault)
    return fault


def passes_self_test(name: str, device: torch.device, with_bias: bool, with_exclude: bool, width: int = 64) -> bool:
    """Whether a back end gives the right answer here."""
    chosen = next(each for each in BACKENDS if each.name == name)
    return not self_test(chosen, device, width, with_bias, int(with_exclude))


def select_backend(asked: AttentionInputs) -> AttentionBackend:
    """Return the first back end that can do what is asked; the log says once for each kind of call which and why."""
    keys, with_bias = asked.keys, asked.bias is not None
    num_excluded = 0 if asked.exclude is None else asked.exclude.shape[1]
    passed = []
    for each in BACKENDS:
        fault = each.unsupported_reason(asked)
        if not fault and each.device:
            fault = self_test(each, keys.device, keys.shape[1], with_bias, num_excluded)
        if not fault:
            _log_selection(keys.device, keys.dtype, keys.shape[1], with_bias, num_excluded, each.name, tuple(passed))
            return each
        passed.append(f"{each.name} {fault}")
    raise AssertionError("the tiles can do everything")


@functools.cache
def _log_selection(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    with_bias: bool,
    num_excluded: int,
    chosen: str,
    passed: tuple[str, ...],
) -> None:
    kind = f"{device}, {_named(dtype)}, width {width}" + ", bias" * with_bias
    kind += f", {num_excluded} excluded" if num_excluded else ""
    log.info("attention (%s): %s%s", kind, chosen, "".join(f"; {each}" for each in passed))
