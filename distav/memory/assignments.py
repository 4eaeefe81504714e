"""The category assignments that the bank's rows were last given, and the Gram matrices of their columns.

The category-level loss compares columns, and the cosines of columns need only K x K sums over the rows. Shares are
stored in steps of 1/127, so these sums are integers: they stay exact however often rows are replaced, in whatever
order and on any number of ranks. Legend: n rows of this rank, K categories.
"""

import torch
from torch import Tensor

STEPS = 127
_EXACT_ROWS = 512
"""Rows whose sums and differences, integers up to 254 and 127, have products that add up to less than 2^24."""


class Assignments:
    """Stored shares of the rows of one rank.

    Attributes:
        shares: [n, 2, K] uint8, picture and sound; share times 127, all zero before the first visit.
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
            shares = self.shares[start : start + 2**16]
            self.gram += _gram_change(shares, torch.zeros_like(shares))
        self.assigned = int(self.shares.flatten(1).any(1).sum())

    def replace(self, rows: Tensor, shares: Tensor) -> None:
        """Store new shares [p, 2, K] in 0..1 for the rows [p], each named once."""
        new = (shares.clamp(0, 1) * STEPS).round_().to(torch.uint8)
        old = self.shares[rows]
        self.gram += _gram_change(new, old)
        self.assigned += int(new.flatten(1).any(1).sum()) - int(old.flatten(1).any(1).sum())
        self.shares[rows] = new

    def columns(self) -> tuple[Tensor, int]:
        """Return the Gram matrices [3, K, K] of the stored shares in 0..1, and the number of rows in them."""
        return self.gram.div(STEPS**2).float(), self.assigned


def _gram_change(new: Tensor, old: Tensor) -> Tensor:
    """Return new^T new - old^T old of the columns: [p, 2, K] uint8 twice -> [3, K, K] float64, exact.

    With s = new + old and d = new - old it is (d^T s + s^T d) / 2, for a symmetric matrix one product and not two.
    """
    total = torch.zeros(3, new.shape[2], new.shape[2], dtype=torch.float64, device=new.device)
    for start in range(0, len(new), _EXACT_ROWS):
        part = slice(start, start + _EXACT_ROWS)
        now, before = new[part].float(), old[part].float()
        (sv, sa), (dv, da) = (now + before).unbind(1), (now - before).unbind(1)
        vv, aa = dv.T @ sv, da.T @ sa
        total += torch.stack([vv + vv.T, torch.addmm(dv.T @ sa, sv.T, da), aa + aa.T])
    return total.div_(2)
