"""Triton kernels of the k-NN search on CUDA devices.

Each kernel replaces several passes of PyTorch operators over memory by one. `self_test` compares the results before the
kernels are used. It detects devices and versions of Triton on which the kernels cannot be compiled or are wrong.
Legend: b queries, w keys of a tile, m keys, s slots per query, D width, T tiles, p pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distav.memory.packing import pack_coarse

_COLUMNS = 256
"""Scores that a warp compares at a time. In most such blocks no score passes, and nothing more is done."""

_SPAN = 4096
"""Scores that a warp processes in total."""

_TERMS = 2048
"""Products that a program of `_fold_products` computes at a time."""


@triton.jit(do_not_specialize=["tile"])
def _append_passing(
    scores, bound, stored, num_passed, width, slots, tile, num_tiles, SPAN: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0)
    lowest = tl.load(bound + row).to(tl.float32)
    scores += row.to(tl.int64) * width
    stored += row.to(tl.int64) * slots
    first = tl.program_id(1) * SPAN
    column = first + tl.arange(0, COLUMNS)
    next_score = tl.load(scores + column, mask=column < width, other=-float("inf"))
    for start in range(0, SPAN, COLUMNS):
        column, score = first + start + tl.arange(0, COLUMNS), next_score
        next_score = tl.load(scores + column + COLUMNS, mask=column + COLUMNS < width, other=-float("inf"))
        passes = score.to(tl.float32) >= lowest
        if tl.max(passes.to(tl.int32), axis=0) > 0:  # pyright: ignore[reportOperatorIssue]
            slot = tl.atomic_add(num_passed + row + tl.zeros_like(column), 1, mask=passes, sem="relaxed")
            bits = score.to(tl.int16, bitcast=True).to(tl.int64)
            ordered = tl.where(bits < 0, -0x8000 - bits, bits)
            value = ((0x7FFF - ordered) << 32) + (column.to(tl.int64) * num_tiles + tile)
            tl.store(stored + slot, value, mask=passes & (slot < slots))


@triton.jit(do_not_specialize=["num_pairs"])
def _fold_products(
    queries,
    keys,
    row,
    key_index,
    out,
    num_pairs,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < num_pairs
    query = queries + tl.load(row + pair, mask=inside, other=0)[:, None] * (PARTS * LENGTH)
    key = keys + tl.load(key_index + pair, mask=inside, other=0)[:, None] * (PARTS * LENGTH)
    for part in range(PARTS):
        column = part + PARTS * tl.arange(0, LENGTH)[None, :]
        terms = tl.load(query + column).to(tl.float64) * tl.load(key + column).to(tl.float64)
        for _ in tl.static_range(HALVINGS):  # pyright: ignore[reportGeneralTypeIssues]
            terms = tl.sum(tl.reshape(terms, (PAIRS, 2, terms.shape[1] // 2)), axis=1)
        tl.store(out + pair * PARTS + part, tl.reshape(terms, (PAIRS,)), mask=inside)


def append_passing(
    scores: Tensor, bound: Tensor, stored: Tensor, num_passed: Tensor, tile: int, num_tiles: int
) -> None:
    """Append the scores that reach the bound of their query, in any order.

    Args:
        scores: [b, w] in a 16-bit floating-point format.
        bound: [b] in the same format.
        stored: [b, s] int64, receives the scores packed by `pack_coarse` with the position column * T + tile.
        num_passed: [b] int32 number of scores that passed, which is increased; scores beyond s are not stored.
        tile, num_tiles: number of the scored tile, and T.
    """
    num_queries, width = scores.shape
    with torch.cuda.device_of(scores):
        _append_passing[(num_queries, triton.cdiv(width, _SPAN))](
            scores, bound, stored, num_passed, width, stored.shape[1], tile, num_tiles,
            SPAN=_SPAN,  # pyright: ignore[reportArgumentType]
            COLUMNS=_COLUMNS,  # pyright: ignore[reportArgumentType]
            num_warps=1,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def folded_products(queries: Tensor, keys: Tensor, row: Tensor, key_index: Tensor) -> Tensor:
    """Return the products of queries[row] and keys[key_index], folded in halves while their number is even.

    Args:
        queries: [b, D] float32, contiguous.
        keys: [m, D] float32, contiguous.
        row, key_index: [p] int64.

    Returns:
        [p, c] float64 partial sums, where c is the largest odd factor of D.
    """
    width = queries.shape[1]
    length = width & -width
    pairs, parts = max(1, _TERMS // length), width // length
    out = torch.empty(len(row), parts, dtype=torch.float64, device=queries.device)
    if len(row):
        with torch.cuda.device_of(queries):
            _fold_products[(triton.cdiv(len(row), pairs),)](
                queries, keys, row, key_index, out, len(row),
                PAIRS=pairs,  # pyright: ignore[reportArgumentType]
                PARTS=parts,  # pyright: ignore[reportArgumentType]
                LENGTH=length,  # pyright: ignore[reportArgumentType]
                HALVINGS=length.bit_length() - 1,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
    return out


def self_test(device: torch.device, width: int) -> None:
    """Compare the kernels with PyTorch operators at width D.

    Raises:
        RuntimeError: if they differ.
        Exception: any error of Triton if it cannot compile.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.randn(5, 5000, generator=generator).to(device, dtype)
        bound = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], device=device, dtype=dtype)
        stored = torch.full((5, 5000), 2**48, device=device)
        num_passed = torch.zeros(5, dtype=torch.int32, device=device)
        append_passing(scores, bound, stored, num_passed, 3, 7)
        passes = scores >= bound[:, None]
        position = torch.arange(5000, device=device).expand(5, -1) * 7 + 3
        expected = torch.where(passes, pack_coarse(scores, position), stored.new_full((), 2**48))
        if not torch.equal(num_passed, passes.sum(1, dtype=torch.int32)) or not torch.equal(
            stored.sort(dim=1).values, expected.sort(dim=1).values
        ):
            raise RuntimeError("the result of kernel _append_passing differs from PyTorch operators")
    rows = torch.randn(300, width, generator=generator).to(device)
    row, key = torch.randint(300, (2, 1000), generator=generator).to(device)
    terms = rows[row].double() * rows[key].double()
    while terms.shape[1] % 2 == 0:
        terms = terms[:, : terms.shape[1] // 2] + terms[:, terms.shape[1] // 2 :]
    if not torch.equal(folded_products(rows, rows, row, key), terms):
        raise RuntimeError("the result of kernel _fold_products differs from PyTorch operators")
