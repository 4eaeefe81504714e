"""Embeddings of the batch of all ranks.

Legend: b samples of this rank, B of all ranks, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_rows


@dataclass(frozen=True)
class GlobalBatch:
    """Embeddings of the global batch, gathered from all ranks.

    Used as queries of the contrastive losses and to update the memory bank.

    Attributes:
        ids: [B] int64 sample ids.
        valid: [B] bool, false for rows without a usable sample.
        visual, audio: [B, D] unit vectors, without gradient.
    """

    ids: Tensor
    valid: Tensor
    visual: Tensor
    audio: Tensor

    @staticmethod
    def gather(ids: Tensor, valid: Tensor, visual: Tensor, audio: Tensor) -> "GlobalBatch":
        """Gather the b rows of every rank in one collective; the bits of an id are sent as two floats."""
        dim = visual.shape[1]
        id_bits = ids[:, None].contiguous().view(torch.float32)
        rows = all_gather_rows(
            torch.cat([visual.detach().float(), audio.detach().float(), valid[:, None].float(), id_bits], 1)
        )
        # A clone starts at an aligned address; a single row counts as contiguous wherever it starts.
        gathered_bits = rows[:, 2 * dim + 1 :].clone(memory_format=torch.contiguous_format)
        return GlobalBatch(
            ids=gathered_bits.view(torch.int64).squeeze(1),
            valid=rows[:, 2 * dim] > 0,
            visual=rows[:, :dim].contiguous(),
            audio=rows[:, dim : 2 * dim].contiguous(),
        )
