"""Clips that no supervised phase trains on, and the fusion of the classifiers that is fitted to them.

Legend: N training clips, C classes.
"""

import math
from contextlib import closing
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.data.pipeline.sampler import padded_batches
from distav.distributed.collectives import (
    all_gather_variable_rows,
    all_reduce_sum_,
    broadcast,
    get_rank,
    get_world_size,
    shard_range,
)
from distav.evaluation.fusion import Fusion, classifier_log_probs, fit_fusion
from distav.training.run import Run

_MAX_HELD_OUT = 5000
"""Held-out clips of a large dataset; more do not change the weights."""
_MATRIX_PRIOR = 5.0
"""Clips per class that the prior of the noise transition matrix counts as."""
_MIN_RATE = 0.01
"""Lower bound of the mismatch rate; one minus it is the upper bound."""
_MIN_MISMATCH_DEVIATION = 0.3
"""Minimum standard deviation of the log-odds of the mismatch rate; held-out clips differ from all clips by chance."""


def held_out_clips(run: Run) -> NDArray[np.bool_] | None:
    """Return the training clips that supervised phases leave out of their losses: [N] bool; None if there are none.

    They are a random selection of source videos that depends on the seed of the run alone, so all phases and all
    numbers of ranks leave out the same clips. Multi-label datasets, whose classifiers are not fused, and splits with
    less than `fusion.min_clips` such clips with both modalities have none.
    """
    split, config = run.data.train, run.config.fusion
    if run.data.shards.multi_label or split.streams:
        return None
    groups = split.source_codes
    sizes = np.bincount(groups)
    order = np.random.default_rng([run.config.run.seed, 8]).permutation(len(sizes))
    limit = min(config.held_out_fraction * len(split), _MAX_HELD_OUT)
    held_out = np.isin(groups, order[np.cumsum(sizes[order]) <= limit])
    usable = held_out & split.has_modality("visual") & split.has_modality("audio")
    return held_out if usable.sum() >= config.min_clips else None


def fit_run_fusion(run: Run) -> Fusion | None:
    """Return the fusion of the classifiers, fitted to the held-out clips; None if there are none.

    The noise transition matrix of the given labels, the mismatch rate and the owner of the labels of mismatched pairs
    are those of the last label correction. Without one, the noise is symmetric, both rates are estimated with the
    weights, and the labels are those of the video.
    """
    held_out = held_out_clips(run)
    if held_out is None or not any(isinstance(phase, SupervisedPhase) for phase in run.config.phases.values()):
        return None
    split = run.data.train
    ids = np.flatnonzero(held_out & split.has_modality("visual") & split.has_modality("audio"))
    log_probs, ids = _classify(run, ids)
    matrix = _transition_matrix(run)
    correction = run.state.report.corrections[-1] if matrix is not None and run.state.report.corrections else None
    labels = torch.from_numpy(run.data.labels.given)[ids]
    fusion = None
    if get_rank() == 0 and len(ids):
        if correction is None:
            fusion = fit_fusion(log_probs, labels, matrix)
        else:
            mismatch_prior = _mismatch_prior(correction["pair_mismatch_rate"])
            fusion = fit_fusion(log_probs, labels, matrix, mismatch_prior, correction["visual_owner"])
    fusion = broadcast(fusion)
    if fusion is not None:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in asdict(fusion).items())
        run.logger.info(f"fusion of the classifiers, fitted to {len(ids)} held-out clips: {weights}")
    return fusion


def _classify(run: Run, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the classifiers for clips, [3, n, C], and the ids of those that were read, [n].

    Both are on the CPU of all ranks.
    """
    own, largest = shard_range(len(ids)), -(-len(ids) // get_world_size())
    batches = padded_batches(ids[own.start : own.stop], run.micro_batch, -(-largest // run.micro_batch))
    parts: list[tuple[Tensor, Tensor]] = []
    with closing(run.iter_outputs(run.data.train, batches)) as evaluated_batches:
        for _, batch, outputs in evaluated_batches:
            paired = batch.paired
            parts.append((classifier_log_probs(outputs)[:, paired].transpose(0, 1), batch.ids[paired]))
    log_probs, read = (all_gather_variable_rows(torch.cat(column)).cpu() for column in zip(*parts, strict=True))
    return log_probs.transpose(0, 1).contiguous(), read


def _transition_matrix(run: Run) -> Tensor | None:
    """Return T(c, y) of the last label correction on the CPU, [C, C]; None if there was none with a label signal."""
    correction = run.state.correction
    if correction is None or not correction.has_signal:
        return None
    num_classes, bank = len(run.data.shards.classes), run.bank
    labels = torch.from_numpy(run.data.labels.given[bank.rows.start : bank.rows.stop]).to(run.world.device)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=run.world.device)
    counts.index_add_(0, labels, bank.columns["posterior"].double())
    counts = all_reduce_sum_(counts).T.cpu()
    right = float(counts.diagonal().sum() / counts.sum().clamp_min(1e-9))
    symmetric = torch.full_like(counts, (1 - right) / max(1, num_classes - 1)).fill_diagonal_(right)
    counts = counts + _MATRIX_PRIOR * symmetric
    return counts / counts.sum(1, keepdim=True)


def _mismatch_prior(rate: dict[str, float]) -> tuple[float, float]:
    """Return mean and standard deviation of the log-odds of the mismatch rate that a label correction estimated."""
    mean, low, high = (_log_odds(rate[name]) for name in ("estimate", "ci95_low", "ci95_high"))
    return mean, max(_MIN_MISMATCH_DEVIATION, (high - low) / (2 * 1.96))


def _log_odds(rate: float) -> float:
    rate = min(max(rate, _MIN_RATE), 1 - _MIN_RATE)
    return math.log(rate / (1 - rate))
