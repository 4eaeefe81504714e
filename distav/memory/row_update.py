"""Update of the rows of a column by a batch in which rows may occur several times.

Legend: n rows of the column, m positions of the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def moving_average(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Return momentum * old + (1 - momentum) * new."""
    return momentum * old + (1 - momentum) * new


class RowUpdate:
    """The rows that a batch writes, with the mean over the positions of each row.

    No tensor size depends on values, for which the host would have to wait: a row that occurs several times in the
    batch is written several times, with the same numbers.

    Attributes:
        rows: [m] row of each position of the batch.
        written: [m] bool, whether any position of the row is valid.
    """

    def __init__(self, rows: Tensor, valid: Tensor, same_rows: "RowUpdate | None" = None):
        """Group the positions by row.

        Args:
            rows: [m] row of each position.
            valid: [m] bool, false for positions whose values are ignored.
            same_rows: an update with the same `rows`, whose grouping is reused.
        """
        self.rows = rows
        if same_rows is None:
            ordered, order = rows.sort(stable=True)
            self._first_position = order[torch.searchsorted(ordered, rows)]
        else:
            self._first_position = same_rows._first_position
        # Positions that are not valid are added to an extra row, which is never read.
        self._target = torch.where(valid, self._first_position, len(rows))
        count = self._sum(torch.ones(len(rows), device=rows.device))
        self.written = count > 0
        self._divisor = count.clamp_min(1)

    @property
    def is_first(self) -> Tensor:
        """Whether a position is the first of its row: [m] bool."""
        return self._first_position == torch.arange(len(self.rows), device=self.rows.device)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [m, ...] over the valid positions of each row: [m, ...], equal within a row."""
        return self._sum(values).div_(self._divisor.view([-1] + [1] * (values.dim() - 1)))

    def _sum(self, values: Tensor) -> Tensor:
        total = values.new_zeros(len(values) + 1, *values.shape[1:]).index_add_(0, self._target, values)
        return total.index_select(0, self._first_position)

    def apply(self, column: Tensor, new_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Replace the written rows of a column [n, ...] by `new_rows(old rows)`; return the rows, [m, ...]."""
        old = column.index_select(0, self.rows)
        new = torch.where(self.written.view([-1] + [1] * (old.dim() - 1)), new_rows(old), old)
        column[self.rows] = new
        return new
