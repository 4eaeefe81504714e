"""Votes on classes from votes on labels, where the wrong labels of a class are mostly of one other class.

Neighbors vote with their given labels. Under such asymmetric noise the neighbors of a sample agree on a mixture of two
labels, and the larger share is often that of the wrong one. The mixture itself identifies the class: it is that of the
samples around it. A mixture of multinomials over the votes finds the C mixtures of labels, one for each class, and the
unmixed vote is the probability of each class under them.
Legend: n samples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.noise.model_parameters import Votes

NUM_VOTERS = 20.0
"""Voters that a vote counts as. The inverse temperature of the unmixed vote is fitted later."""
ROUNDS = 20
"""Rounds of expectation-maximization."""
MIN_SHARE = 1e-4
"""Smallest share of a label in a mixture."""


@dataclass(frozen=True)
class VoteUnmixing:
    """Mixtures of labels by class: [C, C] for the first vote of each role; None for a role without votes.

    Other votes of a role are on classes already: those of teachers and of an earlier correction.
    """

    visual: Tensor | None
    audio: Tensor | None
    joint: Tensor | None

    @classmethod
    def fit(cls, votes: Votes) -> "VoteUnmixing":
        """Fit the mixtures to the votes of the samples that have them."""
        has_any = votes.has_visual | votes.has_audio
        roles = ((votes.visual, votes.has_visual), (votes.audio, votes.has_audio), (votes.joint, has_any))
        return cls(*(_fit_mixtures(tables[0][present].exp()) if tables else None for tables, present in roles))

    @property
    def names_classes(self) -> bool:
        """Whether the label of each class is the most frequent one in its mixture, so that the mixtures have names.

        Decided by the joint vote, the sharpest one. Otherwise the mixtures are not those of the classes.
        """
        mixtures = self.joint if self.joint is not None else self.visual
        return mixtures is not None and bool((mixtures.argmax(1).cpu() == torch.arange(len(mixtures))).all())

    def apply(self, votes: Votes) -> Votes:
        """Return the votes with the first vote of each role unmixed; missing votes stay uniform."""
        return replace(
            votes,
            visual=_unmix_first(votes.visual, self.visual),
            audio=_unmix_first(votes.audio, self.audio),
            joint=_unmix_first(votes.joint, self.joint),
            visual_halves=[_unmix(table, self.visual) for table in votes.visual_halves],
            audio_halves=[_unmix(table, self.audio) for table in votes.audio_halves],
        )

    def to(self, device: torch.device) -> "VoteUnmixing":
        """Return the mixtures on a device."""
        return VoteUnmixing(
            *(part if part is None else part.to(device) for part in (self.visual, self.audio, self.joint))
        )


def _fit_mixtures(votes: Tensor) -> Tensor:
    """Return the mixture of labels of each class: [n, C] -> [C, C], from the votes whose largest share it is."""
    votes = votes / votes.sum(1, keepdim=True)
    num_classes = votes.shape[1]
    members = torch.zeros_like(votes).scatter_(1, votes.argmax(1, keepdim=True), 1.0)
    mixtures = _mean_votes(votes, members, torch.eye(num_classes, device=votes.device))
    for _ in range(ROUNDS):
        members = _log_probs(votes, mixtures).softmax(1)
        mixtures = _mean_votes(votes, members, mixtures)
    return mixtures


def _mean_votes(votes: Tensor, members: Tensor, otherwise: Tensor) -> Tensor:
    """Return the mean vote of each class: [n, C], [n, C] -> [C, C]; `otherwise` for a class without members."""
    sizes = members.sum(0)[:, None]
    return torch.where(sizes > 0.5, members.t() @ votes / sizes.clamp_min(0.5), otherwise)


def _log_probs(votes: Tensor, mixtures: Tensor) -> Tensor:
    return NUM_VOTERS * votes @ mixtures.clamp_min(MIN_SHARE).log().t()


def _unmix_first(tables: Sequence[Tensor], mixtures: Tensor | None) -> list[Tensor]:
    return [_unmix(table, mixtures) if index == 0 else table for index, table in enumerate(tables)]


def _unmix(table: Tensor, mixtures: Tensor | None) -> Tensor:
    """Return the logarithms of the unmixed vote: [n, C]."""
    if mixtures is None:
        return table
    probs = table.exp()
    unmixed = _log_probs(probs / probs.sum(1, keepdim=True), mixtures).log_softmax(1)
    is_missing = (table.amax(1, keepdim=True) - table.amin(1, keepdim=True)) < 1e-6
    return torch.where(is_missing, table, unmixed)
