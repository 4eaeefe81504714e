"""The category assignments that the bank's rows were last given, and the Gram matrices of their columns.

The category-level loss compares columns, and the cosines of columns need only K x K sums over the rows. Shares are
stored in steps of 1/255, so these sums are integers: they stay exact however often rows are replaced, in whatever
order and on any number of ranks. Legend: n rows of this rank, K categories.
"""

import torch
from torch import Tensor

STEPS = 255
_EXACT_ROWS = 256
"""Rows whose products of integers up to 255 add up exactly in float32."""


class Assignments:
    """Stored shares of the rows of one rank.

    Attributes:
        shares: [n, 2, K] uint8, picture and sound; share times 255, all zero before the first visit.
        gram: [3, K, K] float64 integers: picture with picture, picture with sound, sound with sound.
    """

    def __init__(self, num_rows: int, num_categories: int, device: torch.device):
        self.shares = torch.zeros(num_rows, 2, num_categories, dtype=torch.uint8, device=device)
        self.gram = torch.zeros(3, num_categories, num_categories, dtype=torch.float64, device=device)
        self.assigned = 0

    def recount(self) -> None:
        """Compute the Gram matrices from all rows."""
        self.gram.zero_()
        for start in range(0, len(self.shares), 2**16):
            self.gram += _gram(self.shares[start : start + 2**16])
        self.assigned = int(self.shares.flatten(1).any(1).sum())

    def replace(self, rows: Tensor, shares: Tensor) -> None:
        """Store new shares [p, 2, K] in 0..1 for the rows [p], each named once."""
        new = (shares.clamp(0, 1) * STEPS).round().to(torch.uint8)
        old = self.shares[rows]
        self.gram += _gram(new) - _gram(old)
        self.assigned += int(new.flatten(1).any(1).sum()) - int(old.flatten(1).any(1).sum())
        self.shares[rows] = new

    def without(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the Gram matrices [3, K, K] of shares in 0..1 of all rows but these [p], and their number."""
        left_out = self.shares[rows]
        gram = (self.gram - _gram(left_out)).div_(STEPS**2).float()
        return gram, self.assigned - int(left_out.flatten(1).any(1).sum())


def _gram(shares: Tensor) -> Tensor:
    """Return the products of columns: [p, 2, K] uint8 -> [3, K, K] float64, exact."""
    visual, audio = shares.float().unbind(1)
    total = torch.zeros(3, shares.shape[2], shares.shape[2], dtype=torch.float64, device=shares.device)
    for part in range(0, len(shares), _EXACT_ROWS):
        v, a = visual[part : part + _EXACT_ROWS], audio[part : part + _EXACT_ROWS]
        total += torch.stack([v.T @ v, v.T @ a, a.T @ a])
    return total
