"""Correspondence probability of a pair from the class probabilities of its two modalities.

Let p(c) be the class probabilities of the frames and q(c) those of the audio, from independent evidence. If both show
the same class, the likelihood ratio of the pair against chance is r = C sum_c p(c) q(c); if not, it is 1. At a mismatch
rate m, the likelihood of a pair is (1 - m) r + m, and its correspondence probability is (1 - m) r / ((1 - m) r + m).
Audio of the same class from another clip counts as matching: the class label is correct for both modalities.
Diffuse votes and a high mismatch rate are confounded, because either lowers the agreement of confident predictions. The
mismatch rate is therefore estimated from the vote of least entropy, and the correspondence of each pair from the vote
that agrees most.
Legend: n samples of this rank, C classes, R rates, S inverse temperatures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.calibration import (
    INVERSE_TEMPERATURES,
    average_over_temperatures,
    temperature_scaled,
    temperature_weights,
)
from distav.noise.noise_rate import RateEstimate, candidate_rates, estimate_rate
from distav.noise.probabilities import normalize_likelihood, normalize_rows, row_entropy
from distav.noise.tiling import tiles

MIN_TEMPERATURE_WEIGHT, MIN_RATE_WEIGHT = 1e-4, 1e-5
"""Inverse temperatures and mismatch rates of less posterior weight are left out of averages over them."""


@dataclass(frozen=True)
class ClassAgreement:
    """Agreement of an audio vote with the class probabilities of the frames.

    Attributes:
        log_likelihood: [R, S] log-likelihood of the pairs by mismatch rate and inverse temperature of the vote.
        per_sample: maximum of the log-likelihood divided by the number of pairs, in nats.
        entropy: mean entropy of the calibrated vote, in nats.
    """

    log_likelihood: Tensor
    per_sample: float
    entropy: float

    @property
    def rate_log_likelihood(self) -> Tensor:
        """Log-likelihood of each mismatch rate, marginalized over the inverse temperature: [R]."""
        return self.log_likelihood.logsumexp(1)


@dataclass(frozen=True)
class PairPosterior:
    """Posterior of the pairs given the class probabilities of both modalities.

    Attributes:
        correspondence: [n] probability that both modalities show the same class.
        audio_probs: [n, C] calibrated class probabilities of the audio.
        mismatch_rate: mismatch rate from the agreement alone; see `reconcile_pair_rate`.
    """

    correspondence: Tensor
    audio_probs: Tensor
    mismatch_rate: RateEstimate


def class_agreement(visual_probs: Tensor, audio_votes: Tensor, usable: Tensor) -> ClassAgreement:
    """Return the likelihood of the pairs at each mismatch rate and inverse temperature of the audio vote.

    Args:
        visual_probs: [n, C] calibrated class probabilities of the frames.
        audio_votes: [n, C] votes on the class of the audio.
        usable: [n] bool; other samples are ignored.
    """
    num_classes = visual_probs.shape[1]
    rates = candidate_rates(num_classes).to(visual_probs.device)[:, None]
    likelihood = rates.new_zeros(len(rates), len(INVERSE_TEMPERATURES))
    for part in tiles(len(audio_votes), max(num_classes, len(rates)), audio_votes.device):
        for column, audio_probs in enumerate(temperature_scaled(audio_votes[part])):
            ratio = _likelihood_ratio(visual_probs[part], audio_probs).double().where(usable[part], 1.0)
            likelihood[:, column] += ((1 - rates) * ratio + rates).log_().sum(1)
    weights = temperature_weights(all_reduce_sum_(likelihood))
    entropy = rates.new_zeros(())
    for part in tiles(len(audio_votes), num_classes, audio_votes.device):
        row_entropies = row_entropy(average_over_temperatures(audio_votes[part], weights))
        entropy += row_entropies.double() @ usable[part].double()
    count, entropy, maximum = torch.stack(
        [*all_reduce_sum_(torch.stack([usable.sum().double(), entropy])), likelihood.max()]
    ).tolist()
    count = max(1.0, count)
    return ClassAgreement(likelihood, maximum / count, entropy / count)


def pair_posterior(
    visual_probs: Tensor, audio_votes: Tensor, agreement: ClassAgreement, rate_log_likelihood: Tensor, usable: Tensor
) -> PairPosterior:
    """Return the posterior of each pair, averaged over the mismatch rate and the inverse temperature.

    Args:
        visual_probs: [n, C] calibrated class probabilities of the frames.
        audio_votes: [n, C] votes on the class of the audio.
        agreement: result of `class_agreement` for these two.
        rate_log_likelihood: [R] log-likelihood of the mismatch rate, which replaces the one of `agreement`.
        usable: [n] bool; other samples get a correspondence probability of 1.
    """
    num_classes = visual_probs.shape[1]
    by_rate = agreement.rate_log_likelihood
    log_likelihood = agreement.log_likelihood - by_rate[:, None] + rate_log_likelihood[:, None]
    posterior = normalize_likelihood(log_likelihood).to(visual_probs.dtype)
    totals = enumerate(torch.stack([column.sum() for column in posterior.unbind(1)]).tolist())
    weights = {index: weight for index, weight in totals if weight > MIN_TEMPERATURE_WEIGHT}
    averaged, ratios = torch.empty_like(visual_probs), visual_probs.new_empty(len(weights), len(visual_probs))
    for part in tiles(len(visual_probs), num_classes, visual_probs.device):
        total = torch.zeros_like(visual_probs[part])
        scaled = temperature_scaled(audio_votes[part], weights)
        for ratio, weight, audio_probs in zip(ratios, weights.values(), scaled, strict=True):
            total += weight * audio_probs
            ratio[part] = _likelihood_ratio(visual_probs[part], audio_probs)
        averaged[part] = normalize_rows(total)
    correspondence = _correspondence(ratios, posterior[:, list(weights)], candidate_rates(num_classes))
    correspondence = torch.where(usable, correspondence.clamp(0, 1), torch.ones_like(correspondence))
    return PairPosterior(correspondence, averaged, estimate_rate(rate_log_likelihood, num_classes))


def _likelihood_ratio(visual_probs: Tensor, audio_probs: Tensor) -> Tensor:
    """Return r of each pair: [t, C] twice -> [t]."""
    return visual_probs.shape[1] * (visual_probs * audio_probs).sum(1)


def _correspondence(ratios: Tensor, posterior: Tensor, rates: Tensor) -> Tensor:
    """Return the correspondence probabilities, averaged over the posterior: [n].

    Args:
        ratios: [T, n] likelihood ratios at T inverse temperatures.
        posterior: [R, T] of mismatch rates and inverse temperatures.
        rates: [R] mismatch rates.
    """
    correspondence = ratios.new_zeros(ratios.shape[1])
    for ratio, by_rate in zip(ratios, posterior.T.tolist(), strict=True):
        for weight, rate in zip(by_rate, rates.tolist(), strict=True):
            if weight > MIN_RATE_WEIGHT:
                matching = (1 - rate) * ratio
                correspondence += weight * matching / (matching + rate).clamp_min(1e-12)
    return correspondence


def reconcile_pair_rate(
    rate: RateEstimate, visual_rate_log_likelihood: Tensor, audio_rate_log_likelihood: Tensor, num_classes: int
) -> RateEstimate:
    """Restrict the mismatch rate to what the label-noise rates of the two modalities imply.

    The agreement determines the mismatch rate m by how it grows with the confidence of the votes, which is modeled only
    roughly. The labels determine it independently: if they are wrong at rate e given the frames, they are wrong at rate
    t = e + m (1 - e - e / (C - 1)) given the audio. The estimate is moved into the 95 % interval that follows, and the
    interval of the result spans both. This holds for symmetric label noise.

    Args:
        rate: mismatch rate from the agreement.
        visual_rate_log_likelihood: [R] log-likelihood of e, over `candidate_rates(C)`.
        audio_rate_log_likelihood: [R] log-likelihood of t, over the same rates.
        num_classes: C.
    """
    rates = candidate_rates(num_classes).to(visual_rate_log_likelihood.device)
    gain = 1 - rates - rates / (num_classes - 1)
    position = (rates[None, :] + rates[:, None] * gain[None, :]) / rates[-1] * (len(rates) - 1)  # [R of m, R of e]
    below = position.floor().long().clamp(0, len(rates) - 2)
    interpolated = torch.lerp(
        audio_rate_log_likelihood[below], audio_rate_log_likelihood[below + 1], (position - below).clamp(0, 1)
    )
    from_labels = estimate_rate((interpolated + visual_rate_log_likelihood[None, :]).logsumexp(1), num_classes)
    restricted = min(max(rate.estimate, from_labels.ci95_low), from_labels.ci95_high)
    return RateEstimate(restricted, rate.ci95_low, rate.ci95_high).spanning(from_labels)


def gate_by_correspondence(probs: Tensor, correspondence: Tensor) -> Tensor:
    """Return c C p + (1 - c), the likelihood ratio of each class from the other modality: [n, C]; 1 where c is 0."""
    c = correspondence[:, None]
    return c * probs.shape[1] * probs + 1 - c
