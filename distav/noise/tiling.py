"""Row-wise computation in tiles, which keeps temporary results small.

Legend: n rows, t rows of a tile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE_ELEMENTS = {"cpu": 2**17, "cuda": 2**22}
"""Elements of a tile by device type: few enough for the L2 cache, enough to outweigh the launch of an operator."""


def tiles(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield the slices that cut a table into tiles. A table without rows has one empty tile.

    Args:
        num_rows: n.
        width: elements of the widest row that is computed.
        device: device of the computation.
    """
    size = max(1, TILE_ELEMENTS[device.type] // max(1, width))
    for start in range(0, max(1, num_rows), size):
        yield slice(start, min(start + size, num_rows))


def map_tiles(width: int, compute: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Compute a table row by row from other tables, without temporary results of its size.

    Args:
        width: elements of the widest row that is computed.
        compute: takes the same t rows of each column and returns t rows.
        columns: [n, ...] each.

    Returns:
        [n, ...] the concatenated results of `compute`.
    """
    result: Tensor | None = None
    for part in tiles(len(columns[0]), width, columns[0].device):
        rows = compute(*(column[part] for column in columns))
        if result is None:
            result = rows.new_empty(len(columns[0]), *rows.shape[1:])
        result[part] = rows
    assert result is not None
    return result
