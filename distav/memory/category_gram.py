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
_ROWS_ON_GPU = 2**13
"""Rows at a time on a GPU, where float64 is fast and small products are not."""


class CategoryAssignments:
    """Stored shares of the rows of one rank.

    Attributes:
        shares: [n, 2, K] uint8, picture and sound; share times 127, all zero before the first visit.
        gram: [3, K, K] float64 integers: picture with picture, picture with sound, sound with sound.
        assigned: int64 without dimensions, how many rows are not all zero.
    """

    def __init__(self, num_rows: int, num_categories: int, device: torch.device):
        self.shares = torch.zeros(num_rows, 2, num_categories, dtype=torch.uint8, device=device)
        self.gram = torch.zeros(3, num_categories, num_categories, dtype=torch.float64, device=device)
        self.assigned = torch.zeros((), dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Forget all shares."""
        for each in (self.shares, self.gram, self.assigned):
            each.zero_()

    def recount(self) -> None:
        """Compute the Gram matrices from all rows."""
        self.gram.zero_()
        self.assigned.zero_()
        for start in range(0, len(self.shares), 2**16):
            shares = self.shares[start : start + 2**16]
            self.gram += _gram_change(shares, shares.new_zeros(1, 1, 1).expand_as(shares))
            self.assigned += shares.flatten(1).any(1).sum()

    def replace(self, rows: Tensor, shares: Tensor, written: Tensor, first: Tensor) -> None:
        """Store new shares.

        Args:
            rows: [p]; one may be named several times, with the same shares and the same `written`.
            shares: [p, 2, K] in 0..1.
            written: [p] bool, False for rows that keep what they have.
            first: [p] bool, True at one of the places of each row.
        """
        old = self.shares.index_select(0, rows)
        new = _either(written, (shares.clamp(0, 1) * STEPS).round_().to(torch.uint8), old)
        self.shares[rows] = new
        once = _either(first, new, old)
        self.gram += _gram_change(once, old)
        self.assigned = self.assigned + once.flatten(1).any(1).sum() - old.flatten(1).any(1).sum()

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return the Gram matrices [3, K, K] of the stored shares in 0..1, and the number of rows in them."""
        return self.gram.div(STEPS**2).float(), self.assigned


def _either(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return `torch.where` by row: [p], [p, 2, K] uint8 twice; several times as fast on a CPU."""
    factor = mask.to(torch.uint8)[:, None, None]
    return yes * factor + no * (1 - factor)


def _gram_change(new: Tensor, old: Tensor) -> Tensor:
    """Return new^T new - old^T old of the columns: [p, 2, K] uint8 twice -> [3, K, K] float64, exact.

    With s = new + old and d = new - old it is (d^T s + s^T d) / 2, for a symmetric matrix one product and not two.
    """
    total = torch.zeros(3, new.shape[2], new.shape[2], dtype=torch.float64, device=new.device)
    dtype, step = (torch.float64, _ROWS_ON_GPU) if new.is_cuda else (torch.float32, _EXACT_ROWS)
    for start in range(0, len(new), step):
        part = slice(start, start + step)
        now, before = new[part].to(dtype), old[part].to(dtype)
        (sv, sa), (dv, da) = (now + before).unbind(1), (now - before).unbind(1)
        vv, aa = dv.T @ sv, da.T @ sa
        total += torch.stack([vv + vv.T, torch.addmm(dv.T @ sa, sv.T, da), aa + aa.T])
    return total.div_(2)
