"""Label correction of embeddings in NumPy arrays, without shards, training or DeepSpeed.

Legend: N samples, E feature width, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray

from distav.config.errors import UserError, did_you_mean, format_list
from distav.noise.class_posterior import probability_of
from distav.noise.embedding_arguments import (
    check_number,
    feasible_neighbors,
    feature_tensors,
    source_codes,
    warn_of_unchanged_labels,
)
from distav.noise.label_correction import correct_labels as correct_local_labels
from distav.noise.noise_rate import RateEstimate
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace

RANKINGS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
"""Scores by which `find_label_issues` can rank samples."""
Ranking = Literal["self_confidence", "normalized_margin", "confidence_weighted_entropy"]


@dataclass(frozen=True)
class CorrectedLabels:
    """Result of `correct_labels`.

    Attributes:
        classes: [C] classes, sorted; the type is that of the labels.
        given: [N] labels as given.
        corrected: [N] labels after correction.
        confidence: [N] float32 probability of the corrected label.
        self_confidence: [N] float32 probability of the given label by the votes of other samples.
        correspondence: [N] float32 probability that both modalities show the same class; 1 for one modality.
        pred_probs: [N, C] float32 class probabilities that do not depend on the sample's own label (cleanlab's
            out-of-sample `pred_probs`).
        label_noise_rate: fraction of wrong labels with a 95 % interval, which holds all rates without a signal.
        label_noise_rate_by_class: the same for the samples of each given class; empty without a signal.
        pair_mismatch_rate: fraction of samples whose modalities show different classes; None for one modality.
        has_signal: whether neighbors predict the given labels at all; if not, the labels are returned unchanged.
    """

    classes: NDArray[Any]
    given: NDArray[Any]
    corrected: NDArray[Any]
    confidence: NDArray[np.float32]
    self_confidence: NDArray[np.float32]
    correspondence: NDArray[np.float32]
    pred_probs: NDArray[np.float32]
    label_noise_rate: RateEstimate
    label_noise_rate_by_class: dict[Any, RateEstimate]
    pair_mismatch_rate: RateEstimate | None
    has_signal: bool

    def __repr__(self) -> str:
        rates = [("label noise rate", self.label_noise_rate), ("pair mismatch rate", self.pair_mismatch_rate)]
        texts = [
            f"{name} {rate.estimate:.1%} (95 % interval {rate.ci95_low:.1%} to {rate.ci95_high:.1%})"
            for name, rate in rates
            if rate is not None
        ]
        result = f"{self.is_issue.sum()} labels changed, {', '.join(texts)}" if self.has_signal else "no label signal"
        return f"CorrectedLabels({len(self.given)} samples, {len(self.classes)} classes: {result})"

    @property
    def is_issue(self) -> NDArray[np.bool_]:
        """[N] whether the correction changed the label."""
        return self.given != self.corrected

    def table(self) -> pa.Table:
        """Return a table with a row per sample, in their order; `table().to_pandas()` if pandas is installed."""
        names = ("confidence", "self_confidence", "correspondence", "is_issue")
        labels = {"given_label": self.given, "corrected_label": self.corrected}
        return pa.table(labels | {name: getattr(self, name) for name in names})


def correct_labels(
    features: ArrayLike | Mapping[str, ArrayLike],
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_neighbors: Sequence[int] = (50, 200, 400),
    min_change_odds: float = 2.0,
    min_log_likelihood_gain: float = 10.0,
) -> CorrectedLabels:
    """Find and correct wrong labels from embeddings, by held-out k-NN votes and the noise model of distav.

    Args:
        features: [N, E] embeddings, or those of two modalities, `{"visual": [N, E], "audio": [N, F]}`. A row of NaN
            means that the sample lacks the modality. Embeddings must not have been trained on the given labels: their
            neighbors would repeat the wrong ones.
        labels: [N] one label per sample, integers or texts.
        groups: [N] identifiers of sources, such as the video that a clip was cut from; samples of one source do not
            vote for each other. By default, each sample is its own source.
        num_neighbors: numbers of voters to select from; those that are too large for the dataset are left out.
        min_change_odds: how many times as probable as the given label another one must be to replace it; up to five
            times more if label noise and mismatched pairs cannot be distinguished.
        min_log_likelihood_gain: gain of the votes over the class frequencies, in nats, below which a warning is
            given and labels are kept.

    Raises:
        UserError: if an argument has the wrong shape, type or value.

    Example:
        >>> result = distav.correct_labels(embeddings, labels)
        >>> print(result.label_noise_rate.estimate, result.table().slice(0, 5))
    """
    given = _labels(labels)
    size = len(given)
    visual, audio, has_modality = feature_tensors(features, size)
    classes, codes = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"labels: all {size} labels are {classes[0]}; give labels of two or more classes.")
    if len(classes) == size:
        raise UserError(f"labels: each of the {size} labels occurs once; give the classes of the samples.")
    min_change_odds = check_number("min_change_odds", min_change_odds, 1)
    min_log_likelihood_gain = check_number("min_log_likelihood_gain", min_log_likelihood_gain, 0)
    neighbors, sources = feasible_neighbors(num_neighbors, size), source_codes(groups, size)
    space = FeatureSpace("features", visual, audio)
    targets = torch.from_numpy(codes.astype(np.int64))
    correction = correct_local_labels(
        [space],
        targets,
        len(classes),
        torch.from_numpy(sources),
        has_modality,
        VoteSearchSpace(num_neighbors=neighbors, min_log_likelihood_gain=min_log_likelihood_gain),
    )
    if not correction.has_signal:
        warn_of_unchanged_labels(size)
    corrected = correction.corrected_labels(targets, min_change_odds)
    rates = zip(classes.tolist(), correction.class_rates, strict=True) if correction.has_signal else ()
    return CorrectedLabels(
        classes=classes,
        given=given,
        corrected=classes[corrected.numpy()],
        confidence=probability_of(corrected, correction.posterior).numpy(),
        self_confidence=probability_of(targets, correction.held_out).numpy(),
        correspondence=correction.correspondence.numpy(),
        pred_probs=correction.held_out.numpy(),
        label_noise_rate=correction.label_rate,
        label_noise_rate_by_class=dict(rates),
        pair_mismatch_rate=correction.pair_rate if all(map(torch.any, has_modality.values())) else None,
        has_signal=correction.has_signal,
    )


def find_label_issues(
    labels: ArrayLike,
    features: ArrayLike | Mapping[str, ArrayLike],
    *,
    return_indices_ranked_by: Ranking | None = None,
    groups: ArrayLike | None = None,
    num_neighbors: Sequence[int] = (50, 200, 400),
    min_change_odds: float = 2.0,
    min_log_likelihood_gain: float = 10.0,
) -> NDArray[Any]:
    """Return which labels are probably wrong, for embeddings as `cleanlab.filter.find_label_issues` for probabilities.

    `labels`, `return_indices_ranked_by` and the result are as in cleanlab; the second argument is embeddings, and
    there are no options of its filters. For several labels per sample, see `distav.correct_label_lists`.

    Args:
        labels: [N] one label per sample.
        features: embeddings; see `correct_labels`.
        return_indices_ranked_by: None for a mask; a score for the indices of the label issues, worst first:
            `self_confidence`, the held-out probability of the given label; `normalized_margin`, this minus the
            largest probability of another class; or `confidence_weighted_entropy`, the probability divided by the
            entropy of all classes.
        groups, num_neighbors, min_change_odds, min_log_likelihood_gain: see `correct_labels`.

    Returns:
        [N] bool, or the indices of the issues.

    Raises:
        UserError: for an unknown score, or as `correct_labels`.
    """
    if return_indices_ranked_by is not None and return_indices_ranked_by not in RANKINGS:
        raise UserError(
            f"return_indices_ranked_by={return_indices_ranked_by!r}: allowed: None, {format_list(RANKINGS)}."
            f"{did_you_mean(str(return_indices_ranked_by), RANKINGS)}"
        )
    result = correct_labels(
        features,
        labels,
        groups=groups,
        num_neighbors=num_neighbors,
        min_change_odds=min_change_odds,
        min_log_likelihood_gain=min_log_likelihood_gain,
    )
    if return_indices_ranked_by is None:
        return result.is_issue
    scores = result.self_confidence
    if return_indices_ranked_by == "normalized_margin":
        others = result.pred_probs.copy()
        others[result.classes[None] == result.given[:, None]] = -1.0
        scores = scores - others.max(1)
    elif return_indices_ranked_by == "confidence_weighted_entropy":
        entropy = -(result.pred_probs * np.log(result.pred_probs.clip(min=1e-12))).sum(1)
        scores = scores / entropy.clip(min=1e-12)
    issues = np.flatnonzero(result.is_issue)
    return issues[np.argsort(scores[issues], kind="stable")]


def _labels(labels: ArrayLike) -> NDArray[Any]:
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "biuU" and len(labels):
        return labels
    allowed = "allowed: [N] integers or texts, one label per sample"
    values = np.asarray(labels, dtype=object)
    if values.ndim != 1:
        several = " For several labels per sample, use distav.correct_label_lists." if values.ndim == 2 else ""
        raise UserError(f"labels: shape {values.shape}; {allowed}.{several}")
    if not len(values):
        raise UserError("labels: empty; give one label per sample.")
    for row, label in enumerate(values):
        if not isinstance(label, str | int | np.integer | np.bool_):
            several = " For several labels per sample, use distav.correct_label_lists." if np.ndim(label) else ""
            raise UserError(f"labels: {label!r} in row {row}; {allowed}.{several}")
    if len({isinstance(label, str) for label in values}) > 1:
        raise UserError("labels: some are texts and others are integers; use one kind.")
    return np.array(values.tolist())
