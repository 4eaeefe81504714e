"""Votes of all samples of a rank, in half the memory of float32 tables. Legend: n samples, t rows, C classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.noise.model_parameters import Votes
from distav.noise.vote_score import log_votes

VOTE_DTYPE = torch.float16
"""Type of stored votes. `log_votes` adds a uniform vote, so the relative error of a probability is below 0.1 %."""


@dataclass(frozen=True)
class VoteTables:
    """Votes by role, and which samples have them; the logarithms are computed for some samples at a time.

    Attributes:
        visual, audio, joint: tables [n, C] of class distributions, uniform where a vote is missing, of any
            floating-point type.
        has_visual, has_audio: [n] bool.
    """

    visual: Sequence[Tensor]
    audio: Sequence[Tensor]
    joint: Sequence[Tensor]
    has_visual: Tensor
    has_audio: Tensor

    def with_joint(self, table: Tensor) -> "VoteTables":
        """Return the votes with another joint vote in front: [n, C]."""
        return replace(self, joint=[table, *self.joint])

    def rows(self, index: Tensor | slice) -> Votes:
        """Return the logarithms of the votes of t samples."""
        visual, audio, joint = (
            [log_votes(table[index].float()) for table in tables] for tables in (self.visual, self.audio, self.joint)
        )
        return Votes(visual, audio, joint, self.has_visual[index], self.has_audio[index])
