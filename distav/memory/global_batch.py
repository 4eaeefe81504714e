"""The embeddings of a batch of all ranks.

Legend: b batch of this rank, B of all ranks, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_rows


@dataclass(frozen=True)
class GlobalBatch:
    """The embeddings of a batch, gathered from all ranks: queries of the loss, then the bank's new rows.

    Attributes:
        ids: [B] int64.
        valid: [B] bool, whether the row carries a sample.
        visual, audio: [B, D] unit vectors, without gradient.
    """

    ids: Tensor
    valid: Tensor
    visual: Tensor
    audio: Tensor

    @staticmethod
    def gather(ids: Tensor, valid: Tensor, visual: Tensor, audio: Tensor) -> "GlobalBatch":
        """Gather b rows of every rank in one collective; the bits of an id travel as two floats."""
        dim = visual.shape[1]
        bits = ids[:, None].contiguous().view(torch.float32)
        rows = all_gather_rows(
            torch.cat([visual.detach().float(), audio.detach().float(), valid[:, None].float(), bits], 1)
        )
        # A clone is aligned; a single row counts as contiguous wherever it begins.
        whole_ids = rows[:, 2 * dim + 1 :].clone(memory_format=torch.contiguous_format).view(torch.int64).squeeze(1)
        return GlobalBatch(
            whole_ids, rows[:, 2 * dim] > 0, rows[:, :dim].contiguous(), rows[:, dim : 2 * dim].contiguous()
        )
