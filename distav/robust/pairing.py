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

from distav.robust.calibration import SHARPNESS, floored
from distav.robust.noise_rate import RateEstimate, estimate_rate, rates
from distav.world import sum_


@dataclass(frozen=True)
class Pairing:
    """What two modalities say of each other.

    Attributes:
        correspondence: [n] probability that both show one class.
        shares: [n, C] calibrated shares of the sound.
        rate: estimated share of mismatched pairs.
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
    logs = floored(votes).log()
    shares = [(sharpness * logs).softmax(1) for sharpness in SHARPNESS]
    ratios = [num_classes * (picture * each).sum(1) for each in shares]
    likelihood = sum_(
        torch.stack([((1 - at[:, None]) * r[usable].double() + at[:, None]).log().sum(1) for r in ratios], dim=1)
    )
    count = float(sum_(usable.sum().double()))
    mass = (likelihood - likelihood.max()).exp()
    mass = (mass / mass.sum()).to(picture.dtype)
    correspondence, sharpened = torch.zeros_like(ratios[0]), torch.zeros_like(picture)
    for column, (ratio, each) in enumerate(zip(ratios, shares, strict=True)):
        if mass[:, column].sum() > 1e-4:
            sharpened += mass[:, column].sum() * each
            for share, mismatched in zip(mass[:, column].tolist(), at.tolist(), strict=True):
                if share > 1e-5:
                    together = (1 - mismatched) * ratio
                    correspondence += share * together / (together + mismatched).clamp_min(1e-12)
    sharpened = sharpened / sharpened.sum(1, keepdim=True)
    correspondence = torch.where(usable, correspondence.clamp(0, 1), torch.ones_like(correspondence))
    evidence = likelihood.logsumexp(1)
    return Pairing(correspondence, sharpened, estimate_rate(evidence, at), float(likelihood.max()) / max(1.0, count))


def gated(shares: Tensor, correspondence: Tensor) -> Tensor:
    """Return evidence from the other modality, in doubt chance: c C p + (1 - c), [n, C]."""
    c = correspondence[:, None]
    return c * shares.shape[1] * shares + 1 - c
