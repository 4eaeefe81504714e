"""How a batch changes rows of a column.

Legend: n rows of the column, m places of the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class RowUpdate:
    """Rows that a batch writes, with the mean of what it brings for each.

    No size here depends on the values, for which the host would have to wait: a row that occurs several times in the
    batch is written each time, with the same numbers.

    Attributes:
        rows: [m] the row of each place of the batch.
        written: [m] bool, whether there is anything usable for the row.
    """

    def __init__(self, rows: Tensor, usable: Tensor, same: "RowUpdate | None" = None):
        """Take rows [m] and whether the values at their places may be used [m]; `same` has the same rows."""
        self.rows = rows
        if same is None:
            ordered, order = rows.sort(stable=True)
            self._first_place = order[torch.searchsorted(ordered, rows)]
        else:
            self._first_place = same._first_place
        # What may not be used is added up in a row of its own.
        self._target = torch.where(usable, self._first_place, len(rows))
        count = self._sum(torch.ones(len(rows), device=rows.device))
        self.written = count > 0
        self._divisor = count.clamp_min(1)

    @property
    def first(self) -> Tensor:
        """Whether a place is the first of its row: [m] bool."""
        return self._first_place == torch.arange(len(self.rows), device=self.rows.device)

    def mean(self, values: Tensor) -> Tensor:
        """Average values [m, ...] by row: [m, ...], the same at each place of a row."""
        return self._sum(values).div_(self._divisor.view([-1] + [1] * (values.dim() - 1)))

    def _sum(self, values: Tensor) -> Tensor:
        total = values.new_zeros(len(values) + 1, *values.shape[1:]).index_add_(0, self._target, values)
        return total.index_select(0, self._first_place)

    def change(self, column: Tensor, new_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Write what `new_of` makes of the rows of a column [n, ...]; return their new values [m, ...]."""
        old = column.index_select(0, self.rows)
        new = torch.where(self.written.view([-1] + [1] * (old.dim() - 1)), new_of(old), old)
        column[self.rows] = new
        return new
