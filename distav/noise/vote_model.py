"""Latent-variable model of the votes of both modalities and the given labels.

A sample has a visual class v and an audio class a. With probability 1 - m its pair matches, v = a; otherwise both
classes are independent. The label names the class of its owner: the common class of a matched pair, and in a mismatched
pair the visual class with probability w, the audio class otherwise. The given label y differs from the owner's class at
rate e: P(y | c) = T[c, y].

Votes V of the visual neighbors and A of the audio neighbors become class probabilities by inverse temperatures b,
p(c) = (1 - eps) softmax(b log V)(c) + eps pi(c), with the class frequencies pi; those of the common class of a matched
pair, f(c), come from the weighted product of all votes, joint ones included. No modality has a special role. With the
likelihood ratio of the pair against chance, r = sum_c p_V(c) p_A(c) / pi(c), a pair matches with the probability
z = (1 - m) r / ((1 - m) r + m), and the given label has the probability

    P(y | V, A) = z L(f) + (1 - z) (w L(p_V) + (1 - w) L(p_A)),    L(p) = sum_c p(c) T[c, y]

Legend: n samples, C classes, G noise rates, K votes of a role, S parameters of the votes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

MAX_EPSILON = 0.5
"""Largest weight of the class frequencies in the class probabilities."""


@dataclass(frozen=True)
class Votes:
    """Logarithms of the votes by role, and which samples have them.

    Attributes:
        visual, audio, joint: K tables [n, C] each; a missing vote is uniform.
        has_visual, has_audio: [n] bool.
    """

    visual: Sequence[Tensor]
    audio: Sequence[Tensor]
    joint: Sequence[Tensor]
    has_visual: Tensor
    has_audio: Tensor

    @property
    def paired(self) -> Tensor:
        """Samples with both modalities: [n] bool."""
        return self.has_visual & self.has_audio

    def rows(self, index: Tensor | slice) -> "Votes":
        """Return the votes of some samples."""
        return self.map(lambda table: table[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Votes":
        """Return the votes with a function applied to each table and to the columns of the modalities."""
        visual, audio, joint = (
            [function(table) for table in tables] for tables in (self.visual, self.audio, self.joint)
        )
        return Votes(visual, audio, joint, function(self.has_visual), function(self.has_audio))


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
        """Return P(y_i | c): [G, n, C]; None for symmetric noise.

        Args:
            labels: [n] y.
            fold: [n] fold of each sample; None averages over the folds.
        """
        if self.matrices is None:
            return None
        by_label = self.matrices.transpose(-1, -2)
        return by_label.mean(1)[:, labels] if fold is None else by_label[:, fold, labels]

    def likelihood(self, probs: Tensor, labels: Tensor, label_probs: Tensor | None) -> Tensor:
        """Return L(p): [G, n, C], [n] -> [G, n]."""
        if label_probs is not None:
            return (probs * label_probs).sum(-1)
        correct = probs.gather(-1, labels.expand(len(probs), -1)[..., None]).squeeze(-1)
        rates = self.rates[:, None]
        return correct * (1 - rates) + (1 - correct) * rates / (probs.shape[-1] - 1)

    def bayes(self, probs: Tensor, labels: Tensor, label_probs: Tensor | None) -> Tensor:
        """Return the class probabilities given the label too, not normalized: [G, n, C], [n] -> [G, n, C]."""
        if label_probs is not None:
            return probs * label_probs
        rates = self.rates.view(-1, 1, 1)
        right = torch.zeros_like(probs).scatter_(-1, labels.expand(len(probs), -1)[..., None], 1.0)
        return probs * (right * (1 - rates) + (1 - right) * rates / (probs.shape[-1] - 1))


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
    """

    votes: Tensor
    mismatch: Tensor
    visual_owner: Tensor
    frequencies: Tensor
    noise: LabelNoise

    def select(self, index: Tensor) -> "Parameters":
        """Return the parameters at some of the noise rates."""
        matrices = self.noise.matrices
        noise = LabelNoise(self.noise.rates[index], None if matrices is None else matrices[index])
        return Parameters(
            self.votes[index], self.mismatch[index], self.visual_owner[index], self.frequencies[index], noise
        )

    def to(self, device: torch.device) -> "Parameters":
        """Return the parameters on a device."""
        matrices = self.noise.matrices
        noise = LabelNoise(self.noise.rates.to(device), None if matrices is None else matrices.to(device))
        votes, mismatch, visual_owner, frequencies = (
            table.to(device) for table in (self.votes, self.mismatch, self.visual_owner, self.frequencies)
        )
        return Parameters(votes, mismatch, visual_owner, frequencies, noise)

    def with_votes(self, votes: Tensor) -> "Parameters":
        """Return the same parameters with other inverse temperatures: [G, S]."""
        return replace(self, votes=votes)


@dataclass(frozen=True)
class ClassProbs:
    """Class probabilities of the modalities and of a matched pair: [G, n, C] each; `ratio` is r: [G, n]."""

    visual: Tensor
    audio: Tensor
    fused: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class LabelLikelihood:
    """Probabilities of the given labels: [G, n] each.

    Attributes:
        visual, audio, fused: L of the three tables of `ClassProbs`.
        matched: z, the probability that the pair matches; 1 for samples with one modality.
        owner: P(y | V, A).
    """

    visual: Tensor
    audio: Tensor
    fused: Tensor
    matched: Tensor
    owner: Tensor


def class_probs(parameters: Parameters, votes: Votes) -> ClassProbs:
    """Return the class probabilities of both modalities and of matched pairs."""
    num_visual, num_audio = len(votes.visual), len(votes.audio)
    scales, frequencies = parameters.votes[:, :-3].exp(), parameters.frequencies[:, None, :]
    epsilon = MAX_EPSILON * parameters.votes[:, -3:].sigmoid()

    def product(tables: Sequence[Tensor], first: int, role: int) -> Tensor:
        logits = sum(scales[:, first + i, None, None] * table for i, table in enumerate(tables))
        assert isinstance(logits, Tensor)
        weight = epsilon[:, role, None, None]
        # Several times faster than softmax(-1) on the CPU, whose kernel is slow for few classes.
        odds = (logits - logits.detach().amax(-1, keepdim=True)).exp()
        return (1 - weight) / odds.sum(-1, keepdim=True) * odds + weight * frequencies

    visual = product(votes.visual, 0, 0)
    audio = product(votes.audio, num_visual, 1)
    fused = product([*votes.visual, *votes.audio, *votes.joint], num_visual + num_audio, 2)
    if not bool(votes.paired.all()):
        visual = torch.where(votes.has_visual[:, None], visual, frequencies)
        audio = torch.where(votes.has_audio[:, None], audio, frequencies)
    return ClassProbs(visual, audio, fused, (visual * audio / frequencies).sum(-1))


def label_likelihood(
    parameters: Parameters, probs: ClassProbs, labels: Tensor, label_probs: Tensor | None, paired: Tensor
) -> LabelLikelihood:
    """Return the probabilities of the given labels.

    Args:
        parameters: parameters of the model.
        probs: class probabilities.
        labels: [n] given labels.
        label_probs: result of `LabelNoise.probabilities`.
        paired: [n] bool, samples with both modalities.
    """
    tables = (probs.visual, probs.audio, probs.fused)
    visual, audio, fused = (parameters.noise.likelihood(table, labels, label_probs) for table in tables)
    mismatch, owner = parameters.mismatch, parameters.visual_owner
    matched = (1 - mismatch) * probs.ratio
    matched = torch.where(paired, matched / (matched + mismatch), 1.0)
    return LabelLikelihood(
        visual, audio, fused, matched, matched * fused + (1 - matched) * (owner * visual + (1 - owner) * audio)
    )


@dataclass(frozen=True)
class Posterior:
    """Class probabilities of samples: [n, C] each; correspondence [n].

    Attributes:
        owner, visual, audio: classes of the label's owner, the frames and the audio, given the label.
        owner_held_out, visual_held_out, audio_held_out: the same, not given the sample's own label.
        correspondence: probability that both modalities show the same class; 1 for samples with one modality.
    """

    owner: Tensor
    visual: Tensor
    audio: Tensor
    owner_held_out: Tensor
    visual_held_out: Tensor
    audio_held_out: Tensor
    correspondence: Tensor

    def __add__(self, other: "Posterior") -> "Posterior":
        """Return the sums of all tables."""
        return Posterior(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def posterior(parameters: Parameters, weights: Tensor, pair: Parameters, votes: Votes, labels: Tensor) -> Posterior:
    """Return class probabilities averaged over the noise rates.

    Args:
        parameters: parameters at G noise rates.
        weights: [G] weight of each noise rate.
        pair: parameters at one mismatch rate, which determine whether the pairs match and who owns their labels.
        votes: votes of n samples.
        labels: [n] given labels.
    """
    probs = replace(class_probs(parameters, votes), ratio=class_probs(pair, votes).ratio)
    parameters = replace(parameters, mismatch=pair.mismatch, visual_owner=pair.visual_owner)
    noise, paired = parameters.noise, votes.paired
    label_probs = noise.probabilities(labels)
    likelihood = label_likelihood(parameters, probs, labels, label_probs, paired)
    visual, audio, fused = (
        noise.bayes(table, labels, label_probs) / value.clamp_min(1e-30)[..., None]
        for table, value in (
            (probs.visual, likelihood.visual),
            (probs.audio, likelihood.audio),
            (probs.fused, likelihood.fused),
        )
    )
    owner = parameters.visual_owner
    matched = likelihood.matched * likelihood.fused / likelihood.owner
    by_visual = (1 - likelihood.matched) * owner * likelihood.visual / likelihood.owner
    by_audio = (1 - matched - by_visual).clamp_min(0.0)
    same_class = by_visual * (visual * probs.audio).sum(-1) + by_audio * (probs.visual * audio).sum(-1)
    correspondence = torch.where(paired, matched + same_class, 1.0)
    before, owner = likelihood.matched[..., None], owner[..., None]
    matched, by_visual, by_audio = (value[..., None] for value in (matched, by_visual, by_audio))

    def average(values: Tensor) -> Tensor:
        return torch.einsum("g,g...->...", weights, values)

    return Posterior(
        owner=average(matched * fused + by_visual * visual + by_audio * audio),
        visual=average(matched * fused + by_visual * visual + by_audio * probs.visual),
        audio=average(matched * fused + by_visual * probs.audio + by_audio * audio),
        owner_held_out=average(
            before * probs.fused + (1 - before) * (owner * probs.visual + (1 - owner) * probs.audio)
        ),
        visual_held_out=average(before * probs.fused + (1 - before) * probs.visual),
        audio_held_out=average(before * probs.fused + (1 - before) * probs.audio),
        correspondence=average(correspondence),
    )
