"""Inputs and parameters of the model of `distav.noise.vote_model`, which defines the symbols.

Legend: n samples, C classes, G noise rates, K votes of a role, F folds of the samples, S parameters of the votes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Votes:
    """Logarithms of the votes by role, and which samples have them.

    Attributes:
        visual, audio, joint: K tables [n, C] each; a missing vote is uniform.
        has_visual, has_audio: [n] bool.
        visual_halves, audio_halves: two tables [n, C] each, of the voters of either half; may be missing.
    """

    visual: Sequence[Tensor]
    audio: Sequence[Tensor]
    joint: Sequence[Tensor]
    has_visual: Tensor
    has_audio: Tensor
    visual_halves: Sequence[Tensor] = ()
    audio_halves: Sequence[Tensor] = ()

    @property
    def paired(self) -> Tensor:
        """Samples with both modalities: [n] bool."""
        return self.has_visual & self.has_audio

    def with_joint(self, table: Tensor) -> "Votes":
        """Return the votes with another joint vote in front: [n, C]."""
        return replace(self, joint=[table, *self.joint])

    def rows(self, index: Tensor | slice) -> "Votes":
        """Return the votes of some samples."""
        return self.map(lambda table: table[index])

    def with_samples_last(self) -> "Votes":
        """Return the same votes, [n, C] each, stored with the samples of a class contiguous."""
        return self.map(lambda table: table.t().contiguous().t() if table.dim() == 2 else table)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Votes":
        """Return the votes with a function applied to each table and to the columns of the modalities."""
        roles = (self.visual, self.audio, self.joint, self.visual_halves, self.audio_halves)
        visual, audio, joint, visual_halves, audio_halves = ([function(table) for table in tables] for tables in roles)
        has_visual, has_audio = function(self.has_visual), function(self.has_audio)
        return Votes(visual, audio, joint, has_visual, has_audio, visual_halves, audio_halves)


@dataclass(frozen=True)
class LabelNoise:
    """P(given | true) at each of G noise rates.

    Attributes:
        rates: [G] e.
        matrices: [G, F, C, C] T for each of F folds of the samples; None for symmetric noise.
    """

    rates: Tensor
    matrices: Tensor | None = None

    def probabilities(self, labels: Tensor, fold: Tensor | None = None) -> Tensor | None:
        """Return P(y_i | c): [G, C, n]; None for symmetric noise.

        Args:
            labels: [n] y.
            fold: [n] fold of each sample; None averages over the folds.
        """
        if self.matrices is None:
            return None
        if fold is None:
            return self.matrices.mean(1)[:, :, labels]
        return self.matrices.transpose(1, 2)[:, :, fold, labels]

    def likelihood(self, probs: Tensor, labels: Tensor, label_probs: Tensor | None) -> Tensor:
        """Return L(p): [G, C, n], [n] -> [G, n]."""
        if label_probs is not None:
            return (probs * label_probs).sum(1)
        correct = probs.gather(1, labels.expand(len(probs), 1, -1)).squeeze(1)
        return self.symmetric_likelihood(correct, probs.shape[1])

    def symmetric_likelihood(self, correct: Tensor, num_classes: int) -> Tensor:
        """Return L(p) of symmetric noise from p(y): [G, ...] -> [G, ...]."""
        rates = self.rates.view(-1, *[1] * (correct.dim() - 1))
        return correct * (1 - rates) + (1 - correct) * rates / (num_classes - 1)

    def bayes(self, probs: Tensor, labels: Tensor, label_probs: Tensor | None) -> Tensor:
        """Return the class probabilities given the label too, not normalized: [G, C, n], [n] -> [G, C, n]."""
        if label_probs is not None:
            return probs * label_probs
        rates = self.rates.view(-1, 1, 1)
        right = torch.zeros_like(probs).scatter_(1, labels.expand(len(probs), 1, -1), 1.0)
        return probs * (right * (1 - rates) + (1 - right) * rates / (probs.shape[1] - 1))


@dataclass(frozen=True)
class Parameters:
    """Parameters of the model at G noise rates.

    Attributes:
        votes: [G, S] logarithms of the inverse temperatures (visual, audio, and all votes in the product), and logits
            of the three weights of the class frequencies relative to `MAX_EPSILON`.
        mismatch: [G, 1] m.
        visual_owner: [G, 1] w.
        frequencies: [G, C] pi.
        noise: T.
        half_scales: [G, 2] inverse temperatures of the visual and of the audio votes of the halves.
    """

    votes: Tensor
    mismatch: Tensor
    visual_owner: Tensor
    frequencies: Tensor
    noise: LabelNoise
    half_scales: Tensor

    def select(self, index: Tensor) -> "Parameters":
        """Return the parameters at some of the noise rates."""
        matrices = self.noise.matrices
        noise = LabelNoise(self.noise.rates[index], None if matrices is None else matrices[index])
        return Parameters(
            self.votes[index],
            self.mismatch[index],
            self.visual_owner[index],
            self.frequencies[index],
            noise,
            self.half_scales[index],
        )

    def to(self, device: torch.device) -> "Parameters":
        """Return the parameters on a device."""
        matrices = self.noise.matrices
        noise = LabelNoise(self.noise.rates.to(device), None if matrices is None else matrices.to(device))
        tables = (self.votes, self.mismatch, self.visual_owner, self.frequencies, self.half_scales)
        votes, mismatch, visual_owner, frequencies, half_scales = (table.to(device) for table in tables)
        return Parameters(votes, mismatch, visual_owner, frequencies, noise, half_scales)

    def with_votes(self, votes: Tensor) -> "Parameters":
        """Return the same parameters with other inverse temperatures: [G, S]."""
        return replace(self, votes=votes)


def at_rates(parameters: Parameters, index: Tensor, rates: Tensor) -> Parameters:
    """Return some of the parameters at other noise rates, with the errors of their matrices scaled: [len(index)]."""
    selected = parameters.select(index)
    matrices = selected.noise.matrices
    if matrices is not None:
        wrong = 1 - matrices.diagonal(dim1=-2, dim2=-1)
        scaled = (wrong * (rates / selected.noise.rates)[:, None, None]).clamp(max=0.999)
        errors = (matrices - torch.diag_embed(1 - wrong)) / wrong.clamp_min(1e-9)[..., None]
        matrices = torch.diag_embed(1 - scaled) + scaled[..., None] * errors
    return replace(selected, noise=LabelNoise(rates, matrices))


def join_parameters(parts: Sequence[Parameters]) -> Parameters:
    """Return the parameters of several groups of noise rates as one."""
    matrices = [part.noise.matrices for part in parts if part.noise.matrices is not None]
    return Parameters(
        torch.cat([part.votes for part in parts]),
        torch.cat([part.mismatch for part in parts]),
        torch.cat([part.visual_owner for part in parts]),
        torch.cat([part.frequencies for part in parts]),
        LabelNoise(torch.cat([part.noise.rates for part in parts]), torch.cat(matrices) if matrices else None),
        torch.cat([part.half_scales for part in parts]),
    )


def with_rows(parameters: Parameters, rows: Tensor, others: Parameters) -> Parameters:
    """Return the parameters with others at the noise rates with the given numbers."""
    index = torch.arange(len(parameters.votes), device=rows.device)
    index[rows] = len(index) + torch.arange(len(rows), device=rows.device)
    return join_parameters([parameters, others]).select(index)
