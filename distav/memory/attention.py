"""Back ends that attend over keys in one pass and return the log-partition of the softmax with its average.

The fused attention operators of PyTorch that tell the log-sum-exp are private, so each is tried on a small problem
before its first use; where one is missing or wrong the next in the list serves. Legend: B queries, n keys, D width.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 1024
"""Keys scored at a time by the tiles."""


@dataclass(frozen=True)
class Asked:
    """What a back end is asked for.

    Attributes:
        queries: [B, D].
        keys, values: [n, D].
        scale: factor on the dot products.
        bias: [n] added to the logits of a key, -inf to leave it out; or None.
        exclude: [B, E] int64 keys that a query must not see, -1 for none; or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    bias: Tensor | None = None
    exclude: Tensor | None = None


Attended = tuple[Tensor, Tensor]
"""lse [B] and out [B, D], float32."""


def merge(lse: Tensor, out: Tensor) -> Attended:
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


def tiles(asked: Asked, tile: int = TILE) -> Attended:
    """Attend tile by tile in plain PyTorch, in float32; the running maximum keeps any temperature safe."""
    queries = asked.queries.float() * asked.scale
    values = asked.values.float()
    top = queries.new_full((len(queries),), -torch.inf)
    total = torch.zeros_like(top)
    out = queries.new_zeros(len(queries), values.shape[1])
    space = queries.new_empty(len(queries) * min(tile, max(1, len(asked.keys))))
    for start in range(0, len(asked.keys), tile):
        keys = asked.keys[start : start + tile].float()
        area = space[: len(queries) * len(keys)].view(len(queries), len(keys))
        logits = torch.mm(queries, keys.T, out=area)
        if asked.bias is not None:
            logits += asked.bias[start : start + tile]
        if asked.exclude is not None:
            column = asked.exclude - start
            row, entry = ((column >= 0) & (column < len(keys))).nonzero(as_tuple=True)
            logits[row, column[row, entry]] = -torch.inf
        higher = torch.maximum(top, logits.amax(1))
        anchor = higher.masked_fill(higher == -torch.inf, 0.0)
        logits.sub_(anchor[:, None]).exp_()
        keep = (top - anchor).exp_()
        total.mul_(keep).add_(logits.sum(1))
        out.mul_(keep[:, None]).addmm_(logits, values[start : start + tile])
        top = higher
    return top + total.log(), out.div_(total.clamp_min(torch.finfo(torch.float32).tiny)[:, None])


def reference(asked: Asked) -> Attended:
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


def _fused(run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Attended]) -> Callable[[Asked], Attended]:
    """Make a back end of an operator over [1, S, B, D]: keys are cut into S parts that take the place of heads.

    On a GPU a thousand queries alone would fill eight of its 132 multiprocessors.
    """

    def attend(asked: Asked) -> Attended:
        size, num_keys = asked.queries.shape[0], len(asked.keys)
        parts = _num_parts(asked.queries, num_keys)
        cut = num_keys // parts * parts
        queries = asked.queries.to(asked.keys.dtype).expand(1, parts, -1, -1)
        keys, values = (each[:cut].view(1, parts, cut // parts, -1) for each in (asked.keys, asked.values))
        bias = None
        if asked.bias is not None:
            bias = asked.bias[:cut].view(1, parts, 1, -1).expand(-1, -1, size, -1)
        lse, out = run(queries, keys, values, bias, asked.scale)
        lse, out = lse.reshape(parts, size), out.reshape(parts, size, -1).float()
        if asked.bias is not None:
            blind = asked.bias[:cut].view(parts, -1).isneginf().all(1)
            lse = lse.masked_fill(blind[:, None], -torch.inf)
            out = out.masked_fill(blind[:, None, None], 0.0)
        if cut < num_keys:
            tail = None if asked.bias is None else asked.bias[cut:]
            last = tiles(Asked(asked.queries, asked.keys[cut:], asked.values[cut:], asked.scale, tail))
            lse, out = torch.cat([lse, last[0][None]]), torch.cat([out, last[1][None]])
        return merge(lse, out)

    return attend


def _num_parts(queries: Tensor, num_keys: int) -> int:
    """Return how many parts of the keys it takes to give every core work, at least 1,024 keys each."""
    if queries.is_cuda:
        wanted = 2 * torch.cuda.get_device_properties(queries.device).multi_processor_count
        blocks = math.ceil(len(queries) / 128)
    else:
        wanted, blocks = torch.get_num_threads(), math.ceil(len(queries) / 256)
    return max(1, min(math.ceil(wanted / blocks), num_keys // TILE))


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Attended:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    return lse, out


def _flash_gpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Attended:
    found = torch.ops.aten._scaled_dot_product_flash_attention(q.contiguous(), k, v, scale=scale)
    return found[1], found[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Attended:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q.contiguous(), k, v, None, True, scale=scale)
    return found[1], found[0]


def _flex(asked: Asked) -> Attended:
    """FlexAttention: compiled on first use, takes bias and excluded keys inside the kernel."""
    size, num_keys = len(asked.queries), len(asked.keys)
    parts = _num_parts(asked.queries, num_keys)
    length = math.ceil(num_keys / parts)
    fill = parts * length - num_keys
    keys, values = asked.keys, asked.values
    if fill:
        keys, values = (torch.cat([each, each.new_zeros(fill, each.shape[1])]) for each in (keys, values))
    bias, exclude = asked.bias, asked.exclude

    def modified(score: Tensor, b: Tensor, part: Tensor, row: Tensor, column: Tensor) -> Tensor:
        key = part * length + column
        if bias is not None:
            score = score + bias[key.clamp(max=num_keys - 1)]
        hidden = key >= num_keys
        if exclude is not None:
            for entry in range(exclude.shape[1]):
                hidden = hidden | (exclude[row, entry] == key)
        return torch.where(hidden, -torch.inf, score)

    queries = asked.queries.to(keys.dtype).expand(1, parts, -1, -1).contiguous()
    cut = (each.view(1, parts, length, -1) for each in (keys, values))
    out, lse = _compiled_flex()(queries, *cut, score_mod=modified, scale=asked.scale, return_lse=True)
    return merge(lse.view(parts, size).float(), out.view(parts, size, -1).float())


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@dataclass(frozen=True)
class BackEnd:
    """One way to attend, and what it can take."""

    name: str
    run: Callable[[Asked], Attended]
    device: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    takes_bias: bool = True
    takes_exclude: bool = True
    largest_width: int = 2**20

    def suits(self, asked: Asked) -> bool:
        """Whether it can do what is asked, here."""
        keys = asked.keys
        return (
            self.device in ("", keys.device.type)
            and keys.dtype in self.dtypes
            and (asked.bias is None or self.takes_bias)
            and (asked.exclude is None or self.takes_exclude)
            and keys.shape[1] <= self.largest_width
            and (not self.device or (keys.shape[1] % 8 == 0 and keys.shape == asked.values.shape and len(keys) > 0))
        )


_HALF = (torch.bfloat16,)
BACK_ENDS = (
    BackEnd("cudnn", _fused(_cudnn), "cuda", _HALF, takes_bias=False, takes_exclude=False, largest_width=128),
    BackEnd("flash", _fused(_flash_gpu), "cuda", _HALF, takes_bias=False, takes_exclude=False, largest_width=256),
    BackEnd("flex", _flex, "cuda", _HALF, largest_width=256),
    BackEnd("flash-cpu", _fused(_flash_cpu), "cpu", (torch.float32,), takes_exclude=False),
    BackEnd("tiles", tiles),
)
"""In order of preference."""


@functools.cache
def works(name: str, device: torch.device, with_bias: bool, with_exclude: bool) -> bool:
    """Whether a back end gives the right answer here, on 300 queries and 2,500 keys."""
    chosen = next(each for each in BACK_ENDS if each.name == name)
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2800, 64, generator=generator), dim=1)
    dtype = chosen.dtypes[0]
    queries, keys = rows[:300].to(device, dtype), rows[300:].to(device, dtype)
    bias = torch.linspace(-1, 1, 2500, device=device) if with_bias else None
    exclude = torch.arange(300, device=device)[:, None] if with_exclude else None
    asked = Asked(queries, keys, keys, 10.0, bias, exclude)
    try:
        lse, out = chosen.run(asked)
    except Exception:  # noqa: BLE001  # whatever a private operator raises, it cannot be used
        return False
    expected_lse, expected_out = reference(asked)
    close = 1e-4 if dtype is torch.float32 else 2e-2
    return bool((lse - expected_lse).abs().max() < close and (out - expected_out).abs().max() < close)


def best_back_end(asked: Asked) -> BackEnd:
    """Return the first back end that can do what is asked."""
    return next(
        each
        for each in BACK_ENDS
        if each.suits(asked)
        and (not each.device or works(each.name, asked.keys.device, asked.bias is not None, asked.exclude is not None))
    )
