"""Whether sound and picture show the same class, told from what each is believed to show.

Let p(c) be the shares of a picture, q(c) those of its sound, evidence gained apart. If they belong together, the ratio
of the evidence to chance is r = C sum_c p(c) q(c); if not, it is 1. With a share m of mismatched pairs the likelihood
of a pair is (1 - m) r + m, and it belongs together with probability (1 - m) r / ((1 - m) r + m).
A sound of the same class from elsewhere counts as belonging: no class label is wronged by it.
Blunt votes and many mismatches look alike: either makes sure pictures and their sounds agree less than fully. So the
share of mismatches is asked of the most decided votes, and which pairs these are of the votes that agree most.
Legend: n samples of this rank, C classes, R rates, S sharpness values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.calibration import INVERSE_TEMPERATURES, blended, entropies, temperature_scaled, temperature_weights
from distav.noise.noise_rate import RateEstimate, estimate_rate, rates
from distav.noise.tiling import normalized, tiles


@dataclass(frozen=True)
class ClassAgreement:
    """How far votes for the sounds agree with what the pictures show.

    Attributes:
        votes: [n, C] for the sounds.
        likelihood: [R, S] log-likelihood of the pairs, by the share of mismatched ones and the sharpness of the votes.
        per_sample: its maximum over the number of pairs, in nats.
        entropy: mean entropy of the calibrated votes, in nats.
    """

    votes: Tensor
    likelihood: Tensor
    per_sample: float
    entropy: float

    @property
    def rate_log_likelihood(self) -> Tensor:
        """Log-likelihood of each share of mismatched pairs, whatever the sharpness: [R]."""
        return self.likelihood.logsumexp(1)


@dataclass(frozen=True)
class PairPosterior:
    """What two modalities say of each other.

    Attributes:
        correspondence: [n] probability that both show one class.
        shares: [n, C] calibrated shares of the sound.
        rate: share of mismatched pairs by the shape of the agreement; see `checked_rate`.
    """

    correspondence: Tensor
    shares: Tensor
    mismatch_rate: RateEstimate


def class_agreement(picture: Tensor, votes: Tensor, usable: Tensor) -> ClassAgreement:
    """Compare votes for the sounds with the pictures at every sharpness and share of mismatched pairs.

    Args:
        picture: [n, C] calibrated shares of the pictures.
        votes: [n, C] votes for the sounds.
        usable: [n] bool; the others do not judge.
    """
    at, num_classes = rates(picture.shape[1]).to(picture.device)[:, None], picture.shape[1]
    likelihood = at.new_zeros(len(at), len(INVERSE_TEMPERATURES))
    for part in tiles(len(votes), max(num_classes, len(at)), votes.device):
        for column, each in enumerate(temperature_scaled(votes[part])):
            ratio = _ratio(picture[part], each).double().where(usable[part], 1.0)
            likelihood[:, column] += ((1 - at) * ratio + at).log_().sum(1)
    weights = temperature_weights(all_reduce_sum_(likelihood))
    entropy = at.new_zeros(())
    for part in tiles(len(votes), num_classes, votes.device):
        entropy += entropies(blended(votes[part], weights)).double() @ usable[part].double()
    count, entropy, best = torch.stack(
        [*all_reduce_sum_(torch.stack([usable.sum().double(), entropy])), likelihood.max()]
    ).tolist()
    count = max(1.0, count)
    return ClassAgreement(votes, likelihood, best / count, entropy / count)


def pair_posterior(picture: Tensor, agreed: ClassAgreement, evidence: Tensor, usable: Tensor) -> PairPosterior:
    """Tell which pairs belong together, averaged over what the share of mismatched ones and the sharpness may be.

    Args:
        picture: [n, C] calibrated shares of the pictures.
        agreed: what votes for the sounds have come to.
        evidence: [R] log-likelihood of the share of mismatched pairs.
        usable: [n] bool; the others count as pairs.
    """
    at = rates(picture.shape[1]).to(picture.device)
    likelihood = agreed.likelihood - agreed.rate_log_likelihood[:, None] + evidence[:, None]
    mass = _mass(likelihood).to(picture.dtype)
    weights = enumerate(torch.stack([each.sum() for each in mass.unbind(1)]).tolist())
    used = {column: weight for column, weight in weights if weight > 1e-4}
    averaged, ratios = torch.empty_like(picture), [torch.empty_like(picture[:, 0]) for _ in used]
    for part in tiles(len(picture), picture.shape[1], picture.device):
        shares = torch.zeros_like(picture[part])
        for ratio, weight, each in zip(
            ratios, used.values(), temperature_scaled(agreed.votes[part], used), strict=True
        ):
            shares += weight * each
            ratio[part] = _ratio(picture[part], each)
        averaged[part] = normalized(shares)
    correspondence = torch.zeros_like(picture[:, 0])
    for ratio, by_rate in zip(ratios, mass[:, list(used)].T.tolist(), strict=True):
        for share, mismatched in zip(by_rate, at.tolist(), strict=True):
            if share > 1e-5:
                together = (1 - mismatched) * ratio
                correspondence += share * together / (together + mismatched).clamp_min(1e-12)
    correspondence = torch.where(usable, correspondence.clamp(0, 1), torch.ones_like(correspondence))
    return PairPosterior(correspondence, averaged, estimate_rate(evidence, at))


def _ratio(picture: Tensor, sound: Tensor) -> Tensor:
    return picture.shape[1] * (picture * sound).sum(1)


def _mass(likelihood: Tensor) -> Tensor:
    mass = (likelihood - likelihood.max()).exp()
    return mass / mass.sum()


def reconcile_pair_rate(shaped: RateEstimate, seen: Tensor, heard: Tensor, num_classes: int) -> RateEstimate:
    """Hold the rate of mismatched pairs against how much better pictures foretell labels than sounds do.

    Agreement tells the rate by how it grows with the sureness of votes, of which shape little is known. Labels tell it
    by another way. Where labels are wrong for a share e
    given what is seen, they are for t = e + m (1 - e - e / (C - 1)) given what is heard. The rate is brought within
    the interval that follows, and the interval of both spans the two. That holds for labels that are taken for any
    other alike.

    Args:
        shaped: the rate by agreement.
        seen, heard: [R] log-likelihood of e and of t, over `rates(C)`.
        num_classes: C.
    """
    at = rates(num_classes).to(seen.device)
    gain = 1 - at - at / (num_classes - 1)
    place = (at[None, :] + at[:, None] * gain[None, :]) / at[-1] * (len(at) - 1)  # [R of m, R of e]
    below = place.floor().long().clamp(0, len(at) - 2)
    expected = torch.lerp(heard[below], heard[below + 1], (place - below).clamp(0, 1))
    told = estimate_rate((expected + seen[None, :]).logsumexp(1), at)
    inside = min(max(shaped.estimate, told.ci95_low), told.ci95_high)
    return RateEstimate(inside, shaped.ci95_low, shaped.ci95_high).spanning(told)


def gate_by_correspondence(shares: Tensor, correspondence: Tensor) -> Tensor:
    """Return evidence from the other modality, in doubt chance: c C p + (1 - c), [n, C]."""
    c = correspondence[:, None]
    return c * shares.shape[1] * shares + 1 - c
