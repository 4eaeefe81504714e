"""Work on tables of many rows, some rows at a time, so that temporary results stay small.

Legend: n rows, t rows of a tile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE_NUMBERS = {"cpu": 2**17, "cuda": 2**22}
"""Numbers in a tile, by device: few enough for the second-level cache, enough to outweigh the call of an operator."""


def tiles(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield the slices that cut a table into tiles; at least one, which is empty where there are no rows.

    Args:
        rows: n.
        width: numbers in the widest row that is computed.
        device: where it is computed.
    """
    size = max(1, TILE_NUMBERS[device.type] // max(1, width))
    for start in range(0, max(1, rows), size):
        yield slice(start, min(start + size, rows))


def in_tiles(width: int, compute: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Compute a table from others, row by row, without temporary results of its size.

    Args:
        width: numbers in the widest row that is computed.
        compute: takes the same t rows of each column and returns t rows.
        columns: [n, ...] each.

    Returns:
        [n, ...] what `compute` returned.
    """
    found: Tensor | None = None
    for part in tiles(len(columns[0]), width, columns[0].device):
        some = compute(*(each[part] for each in columns))
        if found is None:
            found = some.new_empty(len(columns[0]), *some.shape[1:])
        found[part] = some
    assert found is not None
    return found


def normalized(table: Tensor) -> Tensor:
    """Scale rows so that each adds up to 1: [t, C] -> [t, C]."""
    return table / table.sum(1, keepdim=True)
