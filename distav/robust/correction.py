"""Label correction: what a sample's neighbours say that it shows.

Legend: N samples, n samples of this rank, C classes, k neighbours, E feature width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.neighbors import nearest_neighbors
from distav.world import gather_ragged_rows, row_range, sum_


@dataclass(frozen=True)
class Voting:
    """How neighbours vote.

    Attributes:
        neighbors: k of the first vote.
        refine_neighbors: k of the second vote, over the labels that the first one gave; 0 for none.
        temperature: divides the similarity in a neighbour's weight.
        class_prior: exponent of the correction for class frequency.
        gated: whether each modality votes for itself and pairs are weighted by their agreement.
    """

    neighbors: int
    refine_neighbors: int
    temperature: float
    class_prior: float
    gated: bool


@dataclass(frozen=True)
class Correction:
    """What the votes say of this rank's samples.

    Attributes:
        labels: [n, C] by both modalities.
        visual, audio: [n, C] by one modality.
        pairing: [n] how far picture and sound agree, 0..1.
    """

    labels: Tensor
    visual: Tensor
    audio: Tensor
    pairing: Tensor


def correct(
    visual: Tensor, audio: Tensor, given: Tensor, num_classes: int, groups: Tensor, valid: Tensor, voting: Voting
) -> Correction:
    """Vote on the label of each sample among its neighbours in feature space.

    Joint voting looks for neighbours by the mean cosine of both modalities. Gated voting first lets pictures vote
    among pictures, then sounds among sounds with the labels of their pictures; how far the two agree weights the
    sound in the joint similarity f_v.f_v' + W W' f_a.f_a'.

    Args:
        visual, audio: [n, E] features of this rank's ids, `row_range(N)`.
        given: [N] int64 labels.
        num_classes: C.
        groups: [N] int64; samples of one group do not vote for each other.
        valid: [N] bool; samples without features neither vote nor are voted on, they keep their label.
        voting: how.
    """
    own = row_range(len(given))
    present = valid[own.start : own.stop]
    visual, audio = _standardised(visual, present), _standardised(audio, present)

    def vote(features: Tensor, labels: Tensor) -> Tensor:
        first = _vote(features, voting.neighbors, labels, num_classes, groups, valid, voting)
        if voting.refine_neighbors:
            hardened = gather_ragged_rows(first.argmax(1))
            return _vote(features, voting.refine_neighbors, hardened, num_classes, groups, valid, voting)
        return first

    by_picture = vote(visual, given)
    if voting.gated:
        by_sound = vote(audio, gather_ragged_rows(by_picture.argmax(1)))
    else:
        by_sound = vote(audio, given)
    overlap = (by_picture * by_sound).sum(1)
    pairing = (overlap / (by_picture.amax(1) * by_sound.amax(1)).clamp_min(1e-12)).clamp(0, 1)
    gate = pairing[:, None] if voting.gated else 1.0
    labels = vote(torch.cat([visual, gate * audio], dim=1) / 2**0.5, given)
    kept = F.one_hot(given[own.start : own.stop], num_classes).to(labels.dtype)
    labels, by_picture, by_sound = (
        torch.where(present[:, None], each, kept) for each in (labels, by_picture, by_sound)
    )
    return Correction(labels, by_picture, by_sound, torch.where(present, pairing, torch.ones_like(pairing)))


def _standardised(features: Tensor, present: Tensor) -> Tensor:
    """Take the mean over all samples away and scale to unit length: [n, E] -> [n, E].

    Tower outputs are mostly positive; without their mean taken away every two of them look alike.
    """
    some = features.float() * present[:, None]
    total = sum_(torch.cat([some.sum(0), present.sum()[None].float()]))
    return F.normalize(features.float() - total[:-1] / total[-1].clamp_min(1), dim=1) * present[:, None]


def _vote(
    features: Tensor, k: int, labels: Tensor, num_classes: int, groups: Tensor, valid: Tensor, voting: Voting
) -> Tensor:
    """Return the weighted vote of the k nearest neighbours: [n, C], rows add up to 1."""
    ids, similarity = nearest_neighbors(features, k, groups, valid)
    weight = ((similarity - 1) / voting.temperature).exp().masked_fill(ids < 0, 0.0)
    votes = weight.new_zeros(len(ids), num_classes).scatter_add_(1, labels[ids.clamp_min(0)], weight)
    if voting.class_prior:
        counts = torch.bincount(labels[valid], minlength=num_classes).clamp_min(1)
        votes = votes / counts**voting.class_prior
    total = votes.sum(1, keepdim=True)
    return torch.where(total > 0, votes / total.clamp_min(1e-30), torch.full_like(votes, 1 / num_classes))
