"""Correction of label lists with held-out k-NN votes: each class of each clip is present with a probability.

The votes of the visual, the audio and the joint features (`distav.noise.multi_label_votes`) are calibrated for each
class, together with the rates of its missing and wrong labels (`distav.noise.multi_label_model`). True labels are never
used.
Legend: N samples, n samples of this rank, C classes, E feature width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_, broadcast, local_shard
from distav.noise.multi_label_model import LabelVotes, MultiLabelModel, fit_model, frequency_log_likelihood
from distav.noise.multi_label_votes import ListVoteSearch, ListVoteTask, class_offsets, select_votes
from distav.noise.noise_rate import RateEstimate
from distav.noise.tiling import map_tiles

PRESENT = 0.5
"""Probability above which a sample has a class."""
ZERO_TEST = 1.92
"""Loss of log-likelihood below which a rate of 0 is not rejected: half the 95 % quantile of chi-squared."""
NUM_DRAWS = 1000
"""Draws of the parameters from which the intervals of the overall rates are computed."""


@dataclass(frozen=True)
class ListCorrection:
    """Corrected label lists of this rank's samples, and the noise estimates.

    Attributes:
        held_out: [n, C] P(class present) that does not depend on the sample's own labels; the given labels where there
            are no votes or no signal.
        posterior: [n, C] P(class present) that also depends on the sample's own labels, by the noise model.
        missing_rate, wrong_rate: P(label missing | class present) and P(label given | class absent), over all classes.
        class_missing_rates, class_wrong_rates: the same of each class.
        rate_logits: [C, 8] logits of both rates of each class, their standard deviations, those that all classes share,
            and the log-likelihoods that are lost if a rate is 0, for later corrections.
        log_likelihood_gain: gain of the votes over the class frequencies in predicting the given labels, in nats, less
            the number of parameters.
        has_signal: whether the gain exceeds the threshold.
        selected_votes: configuration of each vote.
    """

    held_out: Tensor
    posterior: Tensor
    missing_rate: RateEstimate
    wrong_rate: RateEstimate
    class_missing_rates: list[RateEstimate]
    class_wrong_rates: list[RateEstimate]
    rate_logits: Tensor
    log_likelihood_gain: float
    has_signal: bool
    selected_votes: dict[str, str]


def correct_label_lists(
    spaces: Mapping[str, tuple[Tensor, Tensor]],
    given: Tensor,
    groups: Tensor,
    has_modality: Mapping[str, Tensor],
    search: ListVoteSearch,
    min_log_likelihood_gain: float,
    earlier_rates: Tensor | None = None,
) -> ListCorrection:
    """Correct label lists with the calibrated votes of visual, audio and joint neighbors.

    A later correction keeps the rates and intervals of the first one with a signal: features that were trained on
    corrected labels depend on the given labels, which then seem to be right more often than they are.

    If the votes predict the given labels no better than the class frequencies do, the labels are returned unchanged.

    Args:
        spaces: visual and audio features [n, E] of this rank's samples, `shard_range(N)`, by name of the space.
        given: [N, C] bool given labels of all samples.
        groups: [N] int64; samples of one group do not vote for each other.
        has_modality: [N] bool by modality. Samples without any do not vote and keep their labels.
        search: candidate configurations of the votes.
        min_log_likelihood_gain: gain below which the labels are kept, in nats.
        earlier_rates: [C, 8] `rate_logits` of an earlier correction; None for the first.
    """
    usable = torch.stack(list(has_modality.values())).any(0)
    task = ListVoteTask(given, groups, has_modality, class_offsets(given[usable]))
    local_given, present = local_shard(given), local_shard(usable)
    if not task.members() or not bool(given.any()):
        return identity_correction(given)
    selected = select_votes(spaces, task, search)
    votes = torch.stack([member_votes for _, member_votes in selected.values()], dim=2)
    observed = LabelVotes(votes[present], local_given[present], task.offsets)
    model = fit_model(observed, None if earlier_rates is None else earlier_rates[:, :2])
    gain = model.log_likelihood - model.effective_parameters
    gain -= frequency_log_likelihood(observed.given) - given.shape[1]
    has_signal = gain > min_log_likelihood_gain
    width = votes.shape[1] * votes.shape[2]
    held_out = map_tiles(width, lambda rows: model.held_out(rows, task.offsets), votes)
    posterior = map_tiles(width, model.posterior, held_out, local_given)
    kept = ~present if has_signal else torch.ones_like(present)
    for probs in (held_out, posterior):
        probs[kept] = local_given[kept].float()
    rate_logits = _rate_logits(model)
    if earlier_rates is not None:
        rate_logits = torch.cat([rate_logits[:, :2], earlier_rates[:, 2:]], dim=1)
    rates = _estimate_rates(rate_logits, posterior) if has_signal else _unknown_rates(given.shape[1])
    configs = {name: str(config) for name, (config, _) in selected.items()}
    return ListCorrection(held_out, posterior, *rates, rate_logits, gain, has_signal, configs)


def identity_correction(given: Tensor) -> ListCorrection:
    """Return a correction without signal that keeps all labels, [N, C] bool."""
    local, num_classes = local_shard(given).float(), given.shape[1]
    rate_logits = torch.zeros(num_classes, 8, dtype=torch.float64, device=given.device)
    return ListCorrection(local, local.clone(), *_unknown_rates(num_classes), rate_logits, 0.0, False, {})


def _unknown_rates(num_classes: int) -> tuple[RateEstimate, RateEstimate, list[RateEstimate], list[RateEstimate]]:
    """Return the result of `_estimate_rates` without a label signal."""
    unknown = RateEstimate(0.0, 0.0, 1.0)
    return unknown, unknown, [unknown] * num_classes, [unknown] * num_classes


def _estimate_rates(
    rate_logits: Tensor, posterior: Tensor
) -> tuple[RateEstimate, RateEstimate, list[RateEstimate], list[RateEstimate]]:
    """Return missing and wrong rate over all classes, then of each class, with intervals.

    The overall rates weight the classes by their expected numbers of clips with and without the class. Intervals are
    quantiles of draws from the Laplace approximation, which excludes 0; they reach to 0 if a rate of 0 explains the
    labels about as well (likelihood-ratio test at 5 %).
    """
    counts = torch.stack([posterior.double().sum(0), (1 - posterior.double()).sum(0)])
    counts = all_reduce_sum_(counts)
    generator = torch.Generator().manual_seed(0)
    num_classes = len(rate_logits)
    noise = torch.randn(NUM_DRAWS, num_classes + 1, 2, generator=generator, dtype=torch.float64)
    # The same on all ranks, whatever the last bits of their factorizations are.
    rate_logits = broadcast(rate_logits.cpu())
    center, own, shared, zero_losses = rate_logits.split(2, dim=1)
    logits = center + own * noise[:, 1:] + shared * noise[:, :1]
    overall, by_class = [], []
    for column, weights in enumerate(counts.cpu()):
        rates = logits[:, :, column].sigmoid()
        estimates = rate_logits[:, column].sigmoid()
        weights = weights / weights.sum().clamp_min(1e-9)
        losses = zero_losses[:, column]
        overall.append(_rate(float(estimates @ weights), rates @ weights, float(losses.sum())))
        by_class.append(
            [_rate(float(estimates[index]), rates[:, index], float(losses[index])) for index in range(num_classes)]
        )
    return overall[0], overall[1], by_class[0], by_class[1]


def _rate_logits(model: MultiLabelModel) -> Tensor:
    """Return `ListCorrection.rate_logits` of a model: [C, 8]."""
    tables = (model.parameters, model.deviations, model.shared_deviations, model.zero_losses)
    return torch.cat([table[:, -2:] for table in tables], dim=1)


def _rate(estimate: float, draws: Tensor, zero_loss: float) -> RateEstimate:
    """Return a rate with its interval; `zero_loss` is the log-likelihood that is lost if it is 0."""
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return RateEstimate(estimate, 0.0 if zero_loss < ZERO_TEST else min(low, estimate), max(high, estimate))
