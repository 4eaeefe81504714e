"""Unit vectors, memory banks and batches for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Return random unit vectors in the last dimension."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled_bank(num_samples: int, dim: int) -> Bank:
    """Return a bank with momentum 0.5 and three categories in which every row counts as updated once."""
    bank = Bank(num_samples, dim, 0.5, torch.device("cpu"), num_categories=3)
    bank.columns["visual"].copy_(unit(num_samples, dim, seed=1))
    bank.columns["audio"].copy_(unit(num_samples, dim, seed=2))
    bank.columns["visits"][:] = 1
    bank.refresh()
    return bank


def global_batch_of(ids: Tensor, visual: Tensor, audio: Tensor, valid: Tensor | None = None) -> GlobalBatch:
    """Gather a batch, in which all rows are valid if no mask is given."""
    return GlobalBatch.gather(ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid, visual, audio)
