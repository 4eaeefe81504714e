"""Whether sound and picture show the same class, told from what each is believed to show.

Let p(c) be the shares of a picture, q(c) those of its sound, evidence gained apart. If they belong together, the ratio
of the evidence to chance is r = C sum_c p(c) q(c); if not, it is 1. With a share m of mismatched pairs the likelihood
of a pair is (1 - m) r + m, and it belongs together with probability (1 - m) r / ((1 - m) r + m).
A sound of the same class from elsewhere counts as belonging: no class label is wronged by it.
Legend: n samples of this rank, C classes, R rates, S sharpness values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.robust.calibration import sharpened
from distav.robust.noise_rate import RateEstimate, estimate_rate, rates
from distav.world import sum_


@dataclass(frozen=True)
class Pairing:
    """What two modalities say of each other.

    Attributes:
        correspondence: [n] probability that both show one class.
        shares: [n, C] calibrated shares of the sound.
        rate: share of mismatched pairs by the shape of the agreement; see `checked_rate`.
        per_sample: largest mean log-likelihood ratio to chance, in nats.
    """

    correspondence: Tensor
    shares: Tensor
    rate: RateEstimate
    per_sample: float


def pair_evidence(picture: Tensor, votes: Tensor, usable: Tensor) -> Pairing:
    """Fit the sharpness of the sound's votes and the share of mismatched pairs by maximum likelihood.

    Args:
        picture: [n, C] calibrated shares of the pictures.
        votes: [n, C] votes for the sounds.
        usable: [n] bool; the others count as pairs and do not judge.
    """
    num_classes = picture.shape[1]
    at = rates(2).to(picture.device) * 2 * (num_classes - 1) / num_classes
    shares = sharpened(votes)
    ratios = [num_classes * (picture * each).sum(1) for each in shares]
    likelihood = sum_(
        torch.stack([((1 - at[:, None]) * r[usable].double() + at[:, None]).log().sum(1) for r in ratios], dim=1)
    )
    count = float(sum_(usable.sum().double()))
    mass = (likelihood - likelihood.max()).exp()
    mass = (mass / mass.sum()).to(picture.dtype)
    correspondence, averaged = torch.zeros_like(ratios[0]), torch.zeros_like(picture)
    for column, (ratio, each) in enumerate(zip(ratios, shares, strict=True)):
        if mass[:, column].sum() > 1e-4:
            averaged += mass[:, column].sum() * each
            for share, mismatched in zip(mass[:, column].tolist(), at.tolist(), strict=True):
                if share > 1e-5:
                    together = (1 - mismatched) * ratio
                    correspondence += share * together / (together + mismatched).clamp_min(1e-12)
    averaged = averaged / averaged.sum(1, keepdim=True)
    correspondence = torch.where(usable, correspondence.clamp(0, 1), torch.ones_like(correspondence))
    evidence = likelihood.logsumexp(1)
    return Pairing(correspondence, averaged, estimate_rate(evidence, at), float(likelihood.max()) / max(1.0, count))


def checked_rate(shaped: RateEstimate, seen: Tensor, heard: Tensor, num_classes: int) -> RateEstimate:
    """Hold the rate of mismatched pairs against how much better pictures foretell labels than sounds do.

    `pair_evidence` tells the rate from how agreement grows with the sureness of votes, of which shape little is known:
    blunt votes and many mismatches look alike. Labels tell it by another way. Where labels are wrong for a share e
    given what is seen, they are for t = e + m (1 - e - e / (C - 1)) given what is heard. The rate is brought within
    the interval that follows, and the interval of both spans the two.

    Args:
        shaped: the rate by `pair_evidence`.
        seen, heard: [R] log-likelihood of e and of t, over `rates(C)`.
        num_classes: C.
    """
    at = rates(num_classes).to(seen.device)
    gain = 1 - at - at / (num_classes - 1)
    place = (at[None, :] + at[:, None] * gain[None, :]) / at[-1] * (len(at) - 1)  # [R of m, R of e]
    below = place.floor().long().clamp(0, len(at) - 2)
    expected = torch.lerp(heard[below], heard[below + 1], (place - below).clamp(0, 1))
    told = estimate_rate((expected + seen[None, :]).logsumexp(1), at)
    inside = min(max(shaped.rate, told.low), told.high)
    return RateEstimate(inside, min(shaped.low, told.low), max(shaped.high, told.high))


def gated(shares: Tensor, correspondence: Tensor) -> Tensor:
    """Return evidence from the other modality, in doubt chance: c C p + (1 - c), [n, C]."""
    c = correspondence[:, None]
    return c * shares.shape[1] * shares + 1 - c
