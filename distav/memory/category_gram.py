"""Category probabilities of the rows of the memory bank, and the Gram matrices of their columns.

The category-level loss compares columns, whose cosines need only K x K sums over the rows. Probabilities are stored
in steps of 1/127, so these sums are integers: they stay exact however often rows are replaced, in any order and on
any number of ranks. Legend: n rows of this rank, m positions of a batch, K categories.
"""

import torch
from torch import Tensor

STEPS = 127
_EXACT_ROWS = 512
"""Rows per product on a CPU: products of integers up to 254 and 127 then add up to less than 2^24."""
_GPU_ROWS = 2**13
"""Rows per product on a GPU, where float64 is fast and small products are slow."""
_RECOUNT_ROWS = 2**16


class CategoryAssignments:
    """Stored category probabilities of the rows of one rank.

    Attributes:
        quantized: [n, 2, K] uint8, visual and audio probabilities times 127; all zero before the first update.
        gram: [3, K, K] float64 integers: visual-visual, visual-audio and audio-audio.
        num_assigned: int64 without dimensions, number of rows that are not all zero.
    """

    def __init__(self, num_rows: int, num_categories: int, device: torch.device):
        self.quantized = torch.zeros(num_rows, 2, num_categories, dtype=torch.uint8, device=device)
        self.gram = torch.zeros(3, num_categories, num_categories, dtype=torch.float64, device=device)
        self.num_assigned = torch.zeros((), dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Set all rows to zero."""
        for tensor in (self.quantized, self.gram, self.num_assigned):
            tensor.zero_()

    def recount(self) -> None:
        """Compute the Gram matrices from all rows."""
        self.gram.zero_()
        self.num_assigned.zero_()
        for start in range(0, len(self.quantized), _RECOUNT_ROWS):
            quantized = self.quantized[start : start + _RECOUNT_ROWS]
            self.gram += _gram_change(quantized, quantized.new_zeros(1, 1, 1).expand_as(quantized))
            self.num_assigned += _count_assigned(quantized)

    def replace(self, rows: Tensor, probs: Tensor, written: Tensor, is_first: Tensor) -> None:
        """Store new probabilities of rows.

        Args:
            rows: [m]; a row may occur several times, with the same `probs` and the same `written`.
            probs: [m, 2, K] in 0..1.
            written: [m] bool, false for rows that are left unchanged.
            is_first: [m] bool, true at one position of each row.
        """
        old = self.quantized.index_select(0, rows)
        new = _select(written, (probs.clamp(0, 1) * STEPS).round_().to(torch.uint8), old)
        self.quantized[rows] = new
        counted = _select(is_first, new, old)
        self.gram += _gram_change(counted, old)
        self.num_assigned = self.num_assigned + _count_assigned(counted) - _count_assigned(old)

    def gram_matrices(self) -> tuple[Tensor, Tensor]:
        """Return the Gram matrices [3, K, K] of the probabilities, and the number of rows that they sum over."""
        return self.gram.div(STEPS**2).float(), self.num_assigned


def _count_assigned(quantized: Tensor) -> Tensor:
    return quantized.flatten(1).any(1).sum()


def _select(mask: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    """Return `torch.where` by row: [m] and two [m, 2, K] uint8; several times as fast on a CPU."""
    factor = mask.to(torch.uint8)[:, None, None]
    return if_true * factor + if_false * (1 - factor)


def _gram_change(new: Tensor, old: Tensor) -> Tensor:
    """Return new^T new - old^T old of the columns: two [m, 2, K] uint8 -> [3, K, K] float64, exact.

    With s = new + old and d = new - old it equals (d^T s + s^T d) / 2, which takes one product instead of two where
    the matrix is symmetric.
    """
    total = torch.zeros(3, new.shape[2], new.shape[2], dtype=torch.float64, device=new.device)
    dtype, step = (torch.float64, _GPU_ROWS) if new.is_cuda else (torch.float32, _EXACT_ROWS)
    for start in range(0, len(new), step):
        part = slice(start, start + step)
        new_part, old_part = new[part].to(dtype), old[part].to(dtype)
        sum_visual, sum_audio = (new_part + old_part).unbind(1)
        diff_visual, diff_audio = (new_part - old_part).unbind(1)
        visual, audio = diff_visual.T @ sum_visual, diff_audio.T @ sum_audio
        across = torch.addmm(diff_visual.T @ sum_audio, sum_visual.T, diff_audio)
        total += torch.stack([visual + visual.T, across, audio + audio.T])
    return total.div_(2)
