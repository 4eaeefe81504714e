"""The label correction that is measured: the only module of this benchmark that calls it.

Legend: N samples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distav.config.phases import LabelCorrectionPhase
from distav.data.modalities import MODALITIES
from distav.noise.label_correction import correct_labels
from distav.noise.noise_rate import RateEstimate
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace
from tools.bench.coverage.problem import CoverageData


@dataclass(frozen=True, eq=False)
class Estimates:
    """What a label correction estimates.

    Attributes:
        posterior, audio_posterior, held_out: [N, C] class probabilities; see `distav.noise.label_correction`.
        corrected: [N] labels after the correction.
        correspondence: [N] probability that audio and frames show the same class.
        label_rate, pair_rate: rates with 95 % intervals.
        class_rates: label-noise rate of each class.
        has_signal: whether the labels were corrected.
    """

    posterior: np.ndarray
    audio_posterior: np.ndarray
    held_out: np.ndarray
    corrected: np.ndarray
    correspondence: np.ndarray
    label_rate: RateEstimate
    pair_rate: RateEstimate
    class_rates: Sequence[RateEstimate]
    has_signal: bool


def run_correction(data: CoverageData) -> Estimates:
    """Correct the labels with the default settings, without results of earlier corrections or teachers."""
    given = torch.from_numpy(data.given)
    correction = correct_labels(
        [FeatureSpace("features", data.visual, data.audio)],
        given,
        data.num_classes,
        groups=torch.from_numpy(data.groups),
        has_modality=dict.fromkeys(MODALITIES, torch.ones(len(data.given), dtype=torch.bool)),
        search_space=VoteSearchSpace(),
    )
    return Estimates(
        posterior=correction.posterior.numpy(),
        audio_posterior=correction.audio_posterior.numpy(),
        held_out=correction.held_out.numpy(),
        corrected=correction.corrected_labels(given, LabelCorrectionPhase.min_change_odds).numpy(),
        correspondence=correction.correspondence.numpy(),
        label_rate=correction.label_rate,
        pair_rate=correction.pair_rate,
        class_rates=correction.class_rates,
        has_signal=correction.has_signal,
    )
