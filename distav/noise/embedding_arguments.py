"""Checks of the arguments of functions that take embeddings: N samples, E feature width."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distav.config.errors import UserError

MODALITY_NAMES = ("visual", "audio")
"""Keys of features of two modalities, the one of features without a key first."""


def feature_tensors(
    features: ArrayLike | Mapping[str, ArrayLike], size: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the visual and audio embeddings, [N, E] float32, and which samples have them, [N] bool by modality.

    Args:
        features: [N, E] numbers, which count as visual, or a mapping of modalities to them. A row of NaN means that the
            sample lacks the modality; its row is zero in the result.
        size: N.

    Raises:
        UserError: for an unknown modality, another shape or type, or values that are not finite.
    """
    arrays = dict(features) if isinstance(features, Mapping) else {MODALITY_NAMES[0]: features}
    if not arrays or not set(arrays) <= set(MODALITY_NAMES):
        raise UserError(f"features: keys {sorted(map(str, arrays))}; allowed: {' and '.join(MODALITY_NAMES)}.")
    tables = {
        name: _check_table(array, f"features[{name!r}]" if isinstance(features, Mapping) else "features", size)
        for name, array in arrays.items()
    }
    if all(np.isnan(table).all() for table in tables.values()):
        raise UserError("features: every row is NaN; give the embeddings of some samples.")
    absent = np.full((size, 1), np.nan, dtype=np.float32)
    visual, audio = (torch.from_numpy(tables.get(name, absent)) for name in MODALITY_NAMES)
    has_modality = {"visual": ~visual.isnan().all(1), "audio": ~audio.isnan().all(1)}
    return visual.nan_to_num(0.0), audio.nan_to_num(0.0), has_modality


def _check_table(array: ArrayLike, what: str, size: int) -> NDArray[np.float32]:
    try:
        values = np.asarray(array.detach().cpu().float() if isinstance(array, Tensor) else array)
        values = values.astype(np.float64) if values.dtype.kind == "O" else values
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: not an array of numbers ({error}); allowed: [N, E] numbers.") from None
    if values.dtype.kind not in "biuf":
        raise UserError(f"{what}: not an array of numbers, but of type {values.dtype}; allowed: [N, E] numbers.")
    if values.ndim != 2 or not values.shape[1] or len(values) != size:
        raise UserError(
            f"{what}: shape {values.shape}; allowed: ({size}, E) with E of 1 or more, a row for each of the {size} "
            "labels."
        )
    with np.errstate(over="ignore"):
        table = values.astype(np.float32)
    unusable = np.flatnonzero(np.isinf(table).any(1) | (np.isnan(table).any(1) & ~np.isnan(table).all(1)))
    if len(unusable):
        raise UserError(
            f"{what}: row {unusable[0]} has values that are not finite in float32 ({len(unusable)} such rows); "
            "allowed: finite numbers, or NaN in the whole row of a sample that lacks the modality."
        )
    return table


def source_codes(groups: Any, size: int) -> NDArray[np.int64]:
    """Return a number for the source of each sample, [N]; without groups, each sample is its own source.

    Raises:
        UserError: unless there are N identifiers, none of which is missing.
    """
    if groups is None:
        return np.arange(size)
    array = np.asarray(groups)
    if array.shape != (size,):
        raise UserError(f"groups: shape {array.shape}; allowed: ({size},), a source for each of the {size} labels.")
    names = list(groups)
    for row, name in enumerate(names):
        if is_missing(name):
            raise UserError(
                f"groups: {name} in row {row}; allowed: an identifier for each sample, and one of its own for a sample "
                "of unknown source."
            )
    return np.unique([str(name) for name in names], return_inverse=True)[1].astype(np.int64)


def is_missing(value: Any) -> bool:
    """Return whether an element of a list stands for a missing value: None, NaN, or NA of pandas."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or bool(value != value)  # noqa: PLR0124


def feasible_neighbors(num_neighbors: Sequence[int], size: int) -> list[int]:
    """Return the numbers of neighbors that N samples have; half of the samples if all are too large.

    Raises:
        UserError: unless they are a list of integers from 1 on.
    """
    is_list = isinstance(num_neighbors, Sequence | np.ndarray) and not isinstance(num_neighbors, str)
    if not (
        is_list
        and len(num_neighbors)
        and all(isinstance(k, int | np.integer) and not isinstance(k, bool) and k >= 1 for k in num_neighbors)
    ):
        raise UserError(f"num_neighbors={num_neighbors!r}: allowed: a list of integers from 1 on, such as [50, 200].")
    return [int(k) for k in num_neighbors if k < size] or [max(1, size // 2)]


def check_number(name: str, value: Any, smallest: float) -> float:
    """Return a number.

    Raises:
        UserError: unless it is one of at least the given size.
    """
    if not isinstance(value, int | float | np.number) or not value >= smallest:
        raise UserError(f"{name}={value!r}: allowed: a number, {smallest:g} or more.")
    return float(value)


def warn_of_unchanged_labels(size: int) -> None:
    """Warn the caller of the calling function that the features of N samples carry no label signal."""
    warnings.warn(
        f"The labels are unchanged, because neighbors do not predict them: {size} samples are too few, or the "
        "features do not separate the classes.",
        stacklevel=3,
    )
