"""Class probabilities of samples from the fitted model of `distav.noise.vote_model`, and the labels that follow.

Legend: n samples, C classes, G noise rates.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from distav.noise.model_parameters import Parameters, Votes
from distav.noise.vote_model import class_probs, held_out_probs, label_likelihood, pair_ratios


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
            The halves of the votes are not used.
        votes: votes of n samples.
        labels: [n] given labels.
    """
    votes = votes.with_samples_last()
    probs = class_probs(parameters, votes, pair_ratios(pair, votes))
    parameters = replace(parameters, mismatch=pair.mismatch, visual_owner=pair.visual_owner)
    noise, paired = parameters.noise, votes.paired
    label_probs = noise.probabilities(labels)
    likelihood = label_likelihood(parameters, probs, labels, label_probs, paired)
    visual, audio, fused = (
        noise.bayes(table, labels, label_probs) / value.clamp_min(1e-30)[:, None]
        for table, value in (
            (probs.owner_if_visual, likelihood.visual),
            (probs.owner_if_audio, likelihood.audio),
            (probs.fused, likelihood.fused),
        )
    )
    owner = parameters.visual_owner
    matched = likelihood.matched * likelihood.fused / likelihood.owner
    by_visual = (1 - likelihood.matched) * owner * likelihood.visual / likelihood.owner
    by_audio = (1 - matched - by_visual).clamp_min(0.0)
    same_class = by_visual * (visual * probs.audio).sum(1) + by_audio * (probs.visual * audio).sum(1)
    correspondence = torch.where(paired, matched + same_class, 1.0)
    before, owner = likelihood.matched[:, None], owner[:, None]
    matched, by_visual, by_audio = (value[:, None] for value in (matched, by_visual, by_audio))

    def average(values: Tensor) -> Tensor:
        """Return the average over the noise rates: [G, n] -> [n], [G, C, n] -> [n, C]."""
        return torch.einsum("g,g...->...", weights, values).t()

    return Posterior(
        owner=average(matched * fused + by_visual * visual + by_audio * audio),
        visual=average(matched * fused + by_visual * visual + by_audio * probs.visual),
        audio=average(matched * fused + by_visual * probs.audio + by_audio * audio),
        owner_held_out=average(held_out_probs(parameters, probs, paired)),
        visual_held_out=average(
            before * probs.fused + (1 - before) * (owner * probs.owner_if_visual + (1 - owner) * probs.visual)
        ),
        audio_held_out=average(
            before * probs.fused + (1 - before) * (owner * probs.audio + (1 - owner) * probs.owner_if_audio)
        ),
        correspondence=average(correspondence),
    )


def corrected_labels(posterior: Tensor, given: Tensor, min_odds: float) -> Tensor:
    """Return the labels after correction: [n, C], [n] -> [n].

    The given label, unless another class is at least `min_odds` times as probable. This minimizes the expected cost if
    a wrong label costs 1, and a right one that is changed `min_odds`.
    """
    largest, likely = posterior.max(1)
    return torch.where(largest >= min_odds * probability_of(given, posterior), likely, given)


def probability_of(labels: Tensor, probs: Tensor) -> Tensor:
    """Return the probabilities of labels: [n], [n, C] -> [n]."""
    return probs.gather(1, labels[:, None]).squeeze(1)
