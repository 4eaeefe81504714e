"""Latent-variable model of the votes of both modalities and the given labels.

A sample has a visual class v and an audio class a. With probability 1 - m its pair matches, v = a; otherwise both
classes are independent. The label names the class of its owner: the common class of a matched pair, and in a mismatched
pair the visual class with probability w, the audio class otherwise. The given label y differs from the owner's class at
rate e: P(y | c) = T[c, y].

Votes V of the visual neighbors and A of the audio neighbors become class probabilities by inverse temperatures b,
p(c) = (1 - eps) softmax(b log V)(c) + eps pi(c), with the class frequencies pi; those of the common class of a matched
pair, f(c), come from the weighted product of all votes, joint ones included. No modality has a special role. With the
likelihood ratio of the pair against chance, r = sum_c p_V(c) p_A(c) / pi(c), a pair matches with the probability
z = (1 - m) r / ((1 - m) r + m). Samples that vote in both modalities would make wrong votes agree; where votes of
disjoint halves of the voters are given, r and z are therefore those of the visual votes of one half and the audio votes
of the other, and z is the mean over both ways. The product f without the votes of the other modality gives the class of
the owner of a mismatched pair, f_V or f_A; without joint votes these are p_V and p_A. The given label has the
probability

    P(y | V, A) = z L(f) + (1 - z) (w L(f_V) + (1 - w) L(f_A)),    L(p) = sum_c p(c) T[c, y]

Tables of class probabilities are [G, C, n]: with few classes and samples, a CPU sums over the second dimension about
twice as fast as over the last one.
Legend: n samples, C classes, G noise rates, K votes of a role, S parameters of the votes, R ratios of a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.noise.model_parameters import Parameters, Votes

MAX_EPSILON = 0.5
"""Largest weight of the class frequencies in the class probabilities."""


@dataclass(frozen=True)
class ClassProbs:
    """Class probabilities of samples.

    Attributes:
        visual, audio, fused: p_V, p_A and f: [G, C, n] each.
        owner_if_visual, owner_if_audio: f_V and f_A: [G, C, n] each.
        ratios: [R, G, n] r.
    """

    visual: Tensor
    audio: Tensor
    fused: Tensor
    owner_if_visual: Tensor
    owner_if_audio: Tensor
    ratios: Tensor


@dataclass(frozen=True)
class LabelLikelihood:
    """Probabilities of the given labels: [G, n] each.

    Attributes:
        visual, audio, fused: L of f_V, f_A and f.
        matched: z, the probability that the pair matches, mean over the ratios; 1 for samples with one modality.
        owner: P(y | V, A).
    """

    visual: Tensor
    audio: Tensor
    fused: Tensor
    matched: Tensor
    owner: Tensor


def class_probs(parameters: Parameters, votes: Votes, ratios: Tensor | None = None) -> ClassProbs:
    """Return the class probabilities of both modalities and of matched pairs.

    Args:
        parameters: parameters of the model.
        votes: votes of n samples.
        ratios: [R, G, n] r; that of the class probabilities by default.
    """
    visual, audio = _modality_probs(parameters, votes)
    num_visual, num_audio = len(votes.visual), len(votes.audio)
    first = num_visual + num_audio
    visual_logits = _logits(parameters, votes.visual, first)
    audio_logits = _logits(parameters, votes.audio, first + num_visual)
    owner_if_visual, owner_if_audio, joint_logits = visual, audio, 0
    if votes.joint:
        joint_logits = _logits(parameters, votes.joint, first + num_visual + num_audio)
        owner_if_visual, owner_if_audio = (
            _normalized(parameters, logits + joint_logits, 2) for logits in (visual_logits, audio_logits)
        )
    fused = _normalized(parameters, visual_logits + audio_logits + joint_logits, 2)
    if ratios is None:
        ratios = _ratios_of(parameters, visual, audio)
    return ClassProbs(visual, audio, fused, owner_if_visual, owner_if_audio, ratios)


def pair_ratios(parameters: Parameters, votes: Votes) -> Tensor:
    """Return r of the visual and the audio votes of all voters: [1, G, n]. Parameters of joint votes are not used."""
    return _ratios_of(parameters, *_modality_probs(parameters, votes))


def _ratios_of(parameters: Parameters, visual: Tensor, audio: Tensor) -> Tensor:
    return (visual * audio / parameters.frequencies[:, :, None]).sum(1)[None]


def _modality_probs(parameters: Parameters, votes: Votes) -> tuple[Tensor, Tensor]:
    """Return p_V and p_A: [G, C, n] each; the class frequencies where a modality is missing."""
    visual = _normalized(parameters, _logits(parameters, votes.visual, 0), 0)
    audio = _normalized(parameters, _logits(parameters, votes.audio, len(votes.visual)), 1)
    if not bool(votes.paired.all()):
        frequencies = parameters.frequencies[:, :, None]
        visual = torch.where(votes.has_visual, visual, frequencies)
        audio = torch.where(votes.has_audio, audio, frequencies)
    return visual, audio


def _logits(parameters: Parameters, tables: Sequence[Tensor], first: int) -> Tensor:
    """Return the logarithms of a weighted product of votes, whose parameters start at `first`: [G, C, n]."""
    scales = parameters.votes[:, first : first + len(tables)].exp()
    logits = sum(scales[:, i, None, None] * table.t() for i, table in enumerate(tables))
    assert isinstance(logits, Tensor)
    return logits


def _normalized(parameters: Parameters, logits: Tensor, role: int) -> Tensor:
    """Return class probabilities with the weight of the class frequencies of a role: [G, C, n]."""
    weight = MAX_EPSILON * parameters.votes[:, role - 3, None, None].sigmoid()
    return (1 - weight) * logits.softmax(1) + weight * parameters.frequencies[:, :, None]


def half_probs(half_scales: Tensor, table: Tensor) -> Tensor:
    """Return the class probabilities of the votes of a half: inverse temperatures [G], votes [n, C] -> [G, C, n]."""
    return (half_scales[:, None, None] * table.t()).softmax(1)


@torch.no_grad()
def agreement_ratios(parameters: Parameters, votes: Votes) -> Tensor:
    """Return r of the votes of disjoint voters, or of the same ones where there are no halves: [R, G, n]."""
    if not votes.visual_halves:
        return pair_ratios(parameters, votes)
    ratios = []
    for visual, audio in zip(votes.visual_halves, reversed(votes.audio_halves), strict=True):
        visual = half_probs(parameters.half_scales[:, 0], visual)
        audio = half_probs(parameters.half_scales[:, 1], audio)
        ratios.append(_ratio_of_halves(visual, audio, parameters.frequencies, votes.paired))
    return torch.stack(ratios)


def _ratio_of_halves(visual: Tensor, audio: Tensor, frequencies: Tensor, paired: Tensor) -> Tensor:
    """Return r of class probabilities whose means over the pairs are not exactly the class frequencies: [G, n].

    Classes that the votes of both modalities prefer would otherwise make independent pairs agree; the mean of r over
    all combinations of a visual and an audio part is 1.
    """
    if not bool(paired.any()):
        return torch.ones_like(visual[:, 0])
    # Weighted sums, since selecting the columns of the pairs would copy the tables.
    weights = paired.to(visual.dtype) / paired.sum()
    means = (visual @ weights) * (audio @ weights)
    return (visual * audio * (frequencies / means.clamp_min(1e-12))[:, :, None]).sum(1)


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
    tables = (probs.owner_if_visual, probs.owner_if_audio, probs.fused)
    visual, audio, fused = (parameters.noise.likelihood(table, labels, label_probs) for table in tables)
    owner, matched = parameters.visual_owner, match_probability(parameters.mismatch, probs.ratios, paired)
    return LabelLikelihood(
        visual, audio, fused, matched, matched * fused + (1 - matched) * (owner * visual + (1 - owner) * audio)
    )


def match_probability(mismatch: Tensor, ratios: Tensor, paired: Tensor) -> Tensor:
    """Return z: [G, 1], [R, G, n], [n] bool -> [G, n]; 1 for samples with one modality."""
    matched = (1 - mismatch) * ratios
    return torch.where(paired, (matched / (matched + mismatch)).mean(0), 1.0)


def held_out_probs(parameters: Parameters, probs: ClassProbs, paired: Tensor) -> Tensor:
    """Return the class probabilities of the label's owner without the label: [G, C, n]."""
    matched = match_probability(parameters.mismatch, probs.ratios, paired)[:, None]
    owner = parameters.visual_owner[:, None]
    return matched * probs.fused + (1 - matched) * (owner * probs.owner_if_visual + (1 - owner) * probs.owner_if_audio)
