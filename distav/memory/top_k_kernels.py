"""Triton kernels of the neighbor search on CUDA devices.

Each does in one pass over memory what takes several in PyTorch's operators. `check` compares both, so that a device
or a version of Triton on which they cannot be compiled, or are wrong, is found before they are used.
Legend: b queries, n keys of a tile, D width, p pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distav.memory.reservoir import sort_keys

_COLUMNS = 256
"""Scores that a warp looks at together. In most of these few none passes, and they are done with."""

_SPAN = 4096
"""Scores that a warp looks at in all."""

_TERMS = 2048


@triton.jit(do_not_specialize=["tile"])
def _append_passing(scores, bound, held, filled, width, slots, tile, tiles, SPAN: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    lowest = tl.load(bound + row).to(tl.float32)
    scores += row.to(tl.int64) * width
    held += row.to(tl.int64) * slots
    first = tl.program_id(1) * SPAN
    column = first + tl.arange(0, COLUMNS)
    following = tl.load(scores + column, mask=column < width, other=-float("inf"))
    for start in range(0, SPAN, COLUMNS):
        column, score = first + start + tl.arange(0, COLUMNS), following
        following = tl.load(scores + column + COLUMNS, mask=column + COLUMNS < width, other=-float("inf"))
        passes = score.to(tl.float32) >= lowest
        if tl.max(passes.to(tl.int32), axis=0) > 0:
            slot = tl.atomic_add(filled + row + tl.zeros_like(column), 1, mask=passes, sem="relaxed")
            bits = score.to(tl.int16, bitcast=True).to(tl.int64)
            ordered = tl.where(bits < 0, -0x8000 - bits, bits)
            value = ((0x7FFF - ordered) << 32) + (column.to(tl.int64) * tiles + tile)
            tl.store(held + slot, value, mask=passes & (slot < slots))


@triton.jit(do_not_specialize=["number"])
def _fold_products(
    queries,
    keys,
    row,
    place,
    out,
    number,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < number
    query = queries + tl.load(row + pair, mask=inside, other=0)[:, None] * (PARTS * LENGTH)
    key = keys + tl.load(place + pair, mask=inside, other=0)[:, None] * (PARTS * LENGTH)
    for part in range(PARTS):
        column = part + PARTS * tl.arange(0, LENGTH)[None, :]
        terms = tl.load(query + column).to(tl.float64) * tl.load(key + column).to(tl.float64)
        for _ in tl.static_range(HALVINGS):  # pyright: ignore[reportGeneralTypeIssues]
            terms = tl.sum(tl.reshape(terms, (PAIRS, 2, terms.shape[1] // 2)), axis=1)
        tl.store(out + pair * PARTS + part, tl.reshape(terms, (PAIRS,)), mask=inside)


def append_passing(scores: Tensor, bound: Tensor, held: Tensor, filled: Tensor, tile: int, num_tiles: int) -> None:
    """Append the scores that reach the bound of their row, in no certain order.

    Args:
        scores: [b, n] in a 16-bit floating-point format.
        bound: [b] in the same format.
        held: [b, s] int64, which takes values that sort by score from the largest, then by place, column * T + tile.
        filled: [b] int32, the number of scores that have passed, which grows. Those past s are not stored.
        tile, num_tiles: the tile that is scored, and T.
    """
    num, width = scores.shape
    with torch.cuda.device_of(scores):
        _append_passing[(num, triton.cdiv(width, _SPAN))](
            scores, bound, held, filled, width, held.shape[1], tile, num_tiles,
            SPAN=_SPAN,  # pyright: ignore[reportArgumentType]
            COLUMNS=_COLUMNS,  # pyright: ignore[reportArgumentType]
            num_warps=1,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def folded_products(queries: Tensor, keys: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Multiply queries[row] by keys[place] in float64 and add up halves of the products while they are of equal length.

    Args:
        queries: [b, D] float32, contiguous.
        keys: [m, D] float32, contiguous.
        row, place: [p] int64.

    Returns:
        [p, c] float64, where c is the odd factor of D.
    """
    width = queries.shape[1]
    length = width & -width
    pairs, parts = max(1, _TERMS // length), width // length
    out = torch.empty(len(row), parts, dtype=torch.float64, device=queries.device)
    if len(row):
        with torch.cuda.device_of(queries):
            _fold_products[(triton.cdiv(len(row), pairs),)](
                queries, keys, row, place, out, len(row),
                PAIRS=pairs,  # pyright: ignore[reportArgumentType]
                PARTS=parts,  # pyright: ignore[reportArgumentType]
                LENGTH=length,  # pyright: ignore[reportArgumentType]
                HALVINGS=length.bit_length() - 1,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
    return out


def check(device: torch.device, width: int) -> None:
    """Compare the kernels with PyTorch's operators at this D.

    Raises:
        RuntimeError: where they differ. Whatever Triton raises where it cannot compile comes through.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.randn(5, 5000, generator=generator).to(device, dtype)
        bound = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], device=device, dtype=dtype)
        held = torch.full((5, 5000), 2**48, device=device)
        filled = torch.zeros(5, dtype=torch.int32, device=device)
        append_passing(scores, bound, held, filled, 3, 7)
        passes = scores >= bound[:, None]
        place = torch.arange(5000, device=device).expand(5, -1) * 7 + 3
        expected = torch.where(passes, sort_keys(scores, place), held.new_full((), 2**48))
        if not torch.equal(filled, passes.sum(1, dtype=torch.int32)) or not torch.equal(
            held.sort(dim=1).values, expected.sort(dim=1).values
        ):
            raise RuntimeError("the kernel that selects scores differs from PyTorch")
    rows = torch.randn(300, width, generator=generator).to(device)
    row, place = torch.randint(300, (2, 1000), generator=generator).to(device)
    terms = rows[row].double() * rows[place].double()
    while terms.shape[1] % 2 == 0:
        terms = terms[:, : terms.shape[1] // 2] + terms[:, terms.shape[1] // 2 :]
    if not torch.equal(folded_products(rows, rows, row, place), terms):
        raise RuntimeError("the kernel that multiplies pairs differs from PyTorch")
