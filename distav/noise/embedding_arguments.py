"""Checks of the arguments of functions that take embeddings: N samples, E feature width."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distav.config.errors import UserError

MODALITY_NAMES = ("visual", "audio")
"""Keys of features of two modalities."""


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
    tables = _check_features(features, size)
    absent = np.full((size, 1), np.nan, dtype=np.float32)
    visual, audio = (torch.from_numpy(tables.get(name, absent)) for name in MODALITY_NAMES)
    has_modality = {"visual": ~visual.isnan().all(1), "audio": ~audio.isnan().all(1)}
    return visual.nan_to_num(0.0), audio.nan_to_num(0.0), has_modality


def _check_features(features: ArrayLike | Mapping[str, ArrayLike], size: int) -> dict[str, NDArray[np.float32]]:
    arrays = dict(features) if isinstance(features, Mapping) else {MODALITY_NAMES[0]: features}
    if not arrays or not set(arrays) <= set(MODALITY_NAMES):
        raise UserError(f"features: keys {sorted(map(str, arrays))}; allowed: {' and '.join(MODALITY_NAMES)}.")
    tables = {}
    for name, array in arrays.items():
        what = f"features[{name!r}]" if isinstance(features, Mapping) else "features"
        try:
            table = np.asarray(array, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{what}: not an array of numbers ({error}); allowed: [N, E] numbers.") from None
        if table.ndim != 2 or not table.shape[1] or len(table) != size:
            raise UserError(f"{what}: shape {table.shape}; allowed: ({size}, E), a row for each of the {size} labels.")
        unusable = np.flatnonzero(np.isinf(table).any(1) | (np.isnan(table).any(1) & ~np.isnan(table).all(1)))
        if len(unusable):
            raise UserError(
                f"{what}: row {unusable[0]} has values that are not finite ({len(unusable)} such rows); allowed: "
                "finite numbers, or NaN in the whole row of a sample that lacks the modality."
            )
        tables[name] = table
    if all(np.isnan(table).all() for table in tables.values()):
        raise UserError("features: every row is NaN; give the embeddings of some samples.")
    return tables


def source_codes(groups: ArrayLike | None, size: int) -> NDArray[np.int64]:
    """Return a number for the source of each sample, [N]; without groups, each sample is its own source.

    Raises:
        UserError: unless there are N identifiers.
    """
    if groups is None:
        return np.arange(size)
    array = np.asarray(groups)
    if array.shape != (size,):
        raise UserError(f"groups: shape {array.shape}; allowed: ({size},), a source for each of the {size} labels.")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def feasible_neighbors(num_neighbors: Sequence[int], size: int) -> list[int]:
    """Return the numbers of neighbors that N samples have; half of the samples if all are too large.

    Raises:
        UserError: for an empty list, or a number below 1.
    """
    if not len(num_neighbors) or any(k < 1 for k in num_neighbors):
        raise UserError(f"num_neighbors={list(num_neighbors)}: allowed: one or more numbers from 1 on.")
    return [k for k in num_neighbors if k < size] or [max(1, size // 2)]


def warn_of_unchanged_labels(size: int) -> None:
    """Warn the caller of the calling function that the features of N samples carry no label signal."""
    warnings.warn(
        f"The labels are unchanged, because neighbors do not predict them: {size} samples are too few, or the "
        "features do not separate the classes.",
        stacklevel=3,
    )
