"""Correction of the label lists of embeddings in NumPy arrays, without shards, training or DeepSpeed.

Legend: N samples, E feature width, C classes.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray

from distav.config.errors import UserError, did_you_mean, format_list
from distav.noise.embedding_arguments import (
    check_number,
    feasible_neighbors,
    feature_tensors,
    source_codes,
    warn_of_unchanged_labels,
)
from distav.noise.multi_label_correction import PRESENT
from distav.noise.multi_label_correction import correct_label_lists as correct_local_label_lists
from distav.noise.multi_label_votes import ListVoteSearch
from distav.noise.noise_rate import RateEstimate
from distav.noise.vote_search import VoteSearchSpace

_ALLOWED = (
    "a list of classes per sample, integers or texts, such as [['dog', 'rain'], []]; or an array [N, C] with the "
    "values 0 and 1"
)


@dataclass(frozen=True)
class CorrectedLabelLists:
    """Result of `correct_label_lists`.

    Attributes:
        classes: C classes.
        given: [N, C] bool labels as given.
        corrected: [N, C] bool labels after correction.
        probabilities: [N, C] float32 probability that the sample has the class, given the votes and its labels.
        pred_probs: [N, C] float32 the same by the votes of other samples alone.
        missing_label_rate: fraction of the labels of true classes that are missing, with a 95 % interval.
        wrong_label_rate: fraction of the other classes that are given as labels.
        missing_label_rate_by_class, wrong_label_rate_by_class: the same of each class; empty without a signal.
        has_signal: whether neighbors predict the given labels at all; if not, the labels are returned unchanged.
    """

    classes: list[Any]
    given: NDArray[np.bool_]
    corrected: NDArray[np.bool_]
    probabilities: NDArray[np.float32]
    pred_probs: NDArray[np.float32]
    missing_label_rate: RateEstimate
    wrong_label_rate: RateEstimate
    missing_label_rate_by_class: dict[Any, RateEstimate]
    wrong_label_rate_by_class: dict[Any, RateEstimate]
    has_signal: bool

    def __repr__(self) -> str:
        rates = {"missing labels": self.missing_label_rate, "wrong labels": self.wrong_label_rate}
        texts = [
            f"{name} {rate.estimate:.1%} (95 % interval {rate.ci95_low:.1%} to {rate.ci95_high:.1%})"
            for name, rate in rates.items()
        ]
        result = f"{self.is_issue.sum()} lists changed, {', '.join(texts)}" if self.has_signal else "no label signal"
        return f"CorrectedLabelLists({len(self.given)} samples, {len(self.classes)} classes: {result})"

    @property
    def is_issue(self) -> NDArray[np.bool_]:
        """[N] whether the correction changed the labels of the sample."""
        return (self.given != self.corrected).any(1)

    def table(self) -> pa.Table:
        """Return a table with a row per sample, in their order.

        The columns are `given_label` and `corrected_label`, lists of classes, `confidence`, the probability of the
        least certain class, and `is_issue`.
        """
        certainty = np.maximum(self.probabilities, 1 - self.probabilities)
        return pa.table(
            {
                "given_label": self._lists(self.given),
                "corrected_label": self._lists(self.corrected),
                "confidence": certainty.min(1),
                "is_issue": self.is_issue,
            }
        )

    def _lists(self, has: NDArray[np.bool_]) -> pa.Array:
        lists = [[self.classes[column] for column in np.flatnonzero(row)] for row in has]
        return pa.array(lists, pa.list_(pa.array(self.classes).type))


def correct_label_lists(
    features: ArrayLike | Mapping[str, ArrayLike],
    labels: Sequence[Sequence[Any]] | ArrayLike,
    *,
    classes: Sequence[Any] | None = None,
    groups: ArrayLike | None = None,
    num_neighbors: Sequence[int] = (50, 200, 400),
    min_log_likelihood_gain: float = 10.0,
) -> CorrectedLabelLists:
    """Find missing and wrong labels of samples with several labels from embeddings, by held-out k-NN votes.

    Args:
        features: [N, E] embeddings, or those of two modalities; see `correct_labels`.
        labels: N lists of classes, integers or texts, which may be empty; or an array [N, C] with 1 for the classes of
            a sample and 0 for the others.
        classes: C classes; by default those of the lists, sorted, or the names or numbers of the columns.
        groups: [N] identifiers of sources; see `correct_labels`.
        num_neighbors: numbers of voters to select from; those that are too large for the dataset are left out.
        min_log_likelihood_gain: gain of the votes over the class frequencies, in nats, below which a warning is
            given and labels are kept.

    Raises:
        UserError: if an argument has the wrong shape, type or value.

    Example:
        >>> result = distav.correct_label_lists(embeddings, [["dog", "rain"], ["rain"], []])
        >>> print(result.missing_label_rate.estimate, result.table().slice(0, 5))
    """
    names, given = _label_matrix(labels, classes)
    size = len(given)
    visual, audio, has_modality = feature_tensors(features, size)
    defaults = VoteSearchSpace()
    correction = correct_local_label_lists(
        {"features": (visual, audio)},
        torch.from_numpy(given),
        torch.from_numpy(source_codes(groups, size)),
        has_modality,
        ListVoteSearch(
            feasible_neighbors(num_neighbors, size),
            defaults.vote_temperatures,
            defaults.whitening_powers,
            defaults.num_components,
        ),
        check_number("min_log_likelihood_gain", min_log_likelihood_gain, 0),
    )
    if not correction.has_signal:
        warn_of_unchanged_labels(size)
    probabilities, is_known = correction.posterior.numpy(), correction.has_signal
    return CorrectedLabelLists(
        classes=names,
        given=given,
        corrected=probabilities > PRESENT,
        probabilities=probabilities,
        pred_probs=correction.held_out.numpy(),
        missing_label_rate=correction.missing_rate,
        wrong_label_rate=correction.wrong_rate,
        missing_label_rate_by_class=dict(zip(names, correction.class_missing_rates, strict=True)) if is_known else {},
        wrong_label_rate_by_class=dict(zip(names, correction.class_wrong_rates, strict=True)) if is_known else {},
        has_signal=is_known,
    )


def _label_matrix(labels: Any, classes: Any) -> tuple[list[Any], NDArray[np.bool_]]:
    """Return the classes and the labels [N, C] bool."""
    if not hasattr(labels, "__len__") or isinstance(labels, str | Mapping):
        raise UserError(f"labels: {type(labels).__name__}; allowed: {_ALLOWED}.")
    if isinstance(classes, str | Set):
        raise UserError(f"classes: {type(classes).__name__}; allowed: a list of classes, in the order of the result.")
    names = None if classes is None else list(classes)
    if names is not None and len(set(names)) < max(len(names), 1):
        raise UserError(f"classes: {format_list(names) or 'empty'}; allowed: one or more classes, each of them once.")
    if hasattr(labels, "__array__"):  # Also those of pandas and PyTorch.
        array = np.asarray(labels)
        columns = getattr(labels, "columns", None)
        if array.ndim == 1 and array.dtype.kind == "O":
            labels = array.tolist()
        elif names is None and columns is not None:
            names = list(columns)
    names, given = _from_lists(labels, names) if isinstance(labels, list | tuple) else _from_array(labels, names)
    if not given.any():
        raise UserError(f"labels: none of the {len(given)} samples has a label; give some of them their classes.")
    return names, given


def _from_array(labels: Any, classes: list[Any] | None) -> tuple[list[Any], NDArray[np.bool_]]:
    try:
        array = np.asarray(labels)
        is_binary = array.ndim == 2 and array.dtype.kind in "biuf" and bool(np.isin(array, (0, 1)).all())
    except (TypeError, ValueError):
        raise UserError(f"labels: {type(labels).__name__}; allowed: {_ALLOWED}.") from None
    if not is_binary:
        raise UserError(
            f"labels: shape {array.shape}, type {array.dtype}; allowed: {_ALLOWED}. For one label per sample, use "
            "distav.correct_labels."
        )
    names = list(range(array.shape[1])) if classes is None else classes
    if len(names) != array.shape[1]:
        raise UserError(f"classes: {len(names)} classes for {array.shape[1]} columns of labels; name each column.")
    return names, array.astype(bool)


def _from_lists(labels: Sequence[Any], classes: list[Any] | None) -> tuple[list[Any], NDArray[np.bool_]]:
    if not len(labels):
        raise UserError("labels: empty; give a list of classes per sample.")
    for row, sample in enumerate(labels):
        is_list = isinstance(sample, list | tuple | set | frozenset | np.ndarray)
        if not is_list or not all(_is_class(name) for name in sample):
            raise UserError(f"labels: {sample!r} in row {row}; allowed: {_ALLOWED}.")
        if len(set(sample)) < len(sample):
            raise UserError(
                f"labels: {sample!r} in row {row} has a class twice; name it once. Rows of 0 and 1 have to be an array."
            )
    lists = [[name if isinstance(name, str) else int(name) for name in sample] for sample in labels]
    used = {name for sample in lists for name in sample}
    if len({isinstance(name, str) for name in used}) > 1:
        raise UserError("labels: some classes are texts and others are integers; use one kind.")
    names = sorted(used) if classes is None else classes
    index = {name: column for column, name in enumerate(names)}
    given = np.zeros((len(lists), len(names)), dtype=bool)
    for row, sample in enumerate(lists):
        for name in sample:
            if name not in index:
                raise UserError(
                    f"labels: class {name!r} in row {row} is not one of the classes {format_list(names)}."
                    f"{did_you_mean(str(name), list(map(str, names)))}"
                )
            given[row, index[name]] = True
    return names, given


def _is_class(name: Any) -> bool:
    return isinstance(name, str | int | np.integer) and not isinstance(name, bool)
