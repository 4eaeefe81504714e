"""Embeddings of the batch of all ranks.

Legend: b samples of this rank, B of all ranks, D width.
"""

from collections.abc import Mapping
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
        present: [B] bool by modality, rows with a sample that has the modality.
        visual, audio: [B, D] unit vectors, without gradient.
    """

    ids: Tensor
    valid: Tensor
    visual: Tensor
    audio: Tensor
    present: dict[str, Tensor]

    @property
    def paired(self) -> Tensor:
        """Rows with a sample that has both modalities: [B] bool."""
        return self.present["visual"] & self.present["audio"]

    @staticmethod
    def gather(
        ids: Tensor, valid: Tensor, visual: Tensor, audio: Tensor, present: Mapping[str, Tensor] | None = None
    ) -> "GlobalBatch":
        """Gather the b rows of every rank in one collective; the bits of an id are sent as two floats.

        Args:
            ids, valid: [b] of this rank.
            visual, audio: [b, D] unit vectors.
            present: [b] bool by modality; None: all valid samples have both.
        """
        dim = visual.shape[1]
        id_bits = ids[:, None].contiguous().view(torch.float32)
        has_visual, has_audio = (present["visual"], present["audio"]) if present else (valid, valid)
        flags = valid.float() + 2 * has_visual.float() + 4 * has_audio.float()
        rows = all_gather_rows(torch.cat([visual.detach().float(), audio.detach().float(), flags[:, None], id_bits], 1))
        flags = rows[:, 2 * dim].long()
        # A clone starts at an aligned address; a single row counts as contiguous wherever it starts.
        gathered_bits = rows[:, 2 * dim + 1 :].clone(memory_format=torch.contiguous_format)
        return GlobalBatch(
            ids=gathered_bits.view(torch.int64).squeeze(1),
            valid=flags & 1 > 0,
            visual=rows[:, :dim].contiguous(),
            audio=rows[:, dim : 2 * dim].contiguous(),
            present={"visual": flags & 2 > 0, "audio": flags & 4 > 0},
        )
