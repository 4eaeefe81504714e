"""Samples with known truth from a file, such as the features of a trained model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distav.config.errors import UserError
from tools.bench.coverage.problem import CoverageData
from tools.bench.coverage.scores import rounded, score_data

ARRAYS = ("visual", "audio", "given", "true", "pair_id", "groups")
"""Arrays of a file: features [N, E]; labels, pairs and sources [N] of integers."""
FAMILY = "stored"


def load(path: Path) -> CoverageData:
    """Return the samples of an .npz file.

    `true` is the class of the frames, which owns the label; it is negative for samples that belong to none of the
    classes. The class of the audio is that of the frames that it was taken from, `pair_id`.

    Raises:
        UserError: if the file cannot be read, or an array is missing or has another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file}
    except (OSError, ValueError) as error:
        raise UserError(f"--features={path}: not a readable .npz file ({error}).") from None
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise UserError(f"--features={path}: {', '.join(missing)} is missing; required: {', '.join(ARRAYS)}.")
    num_samples = len(arrays["given"])
    for name, array in arrays.items():
        dimensions = 2 if name in ("visual", "audio") else 1
        if array.ndim != dimensions or len(array) != num_samples:
            raise UserError(
                f"--features={path}: {name} has shape {list(array.shape)}; required: {dimensions} dimensions, and "
                f"{num_samples} rows as in given."
            )
    given, true, pair_id, groups = (arrays[name].astype(np.int64) for name in ARRAYS[2:])
    if num_samples == 0 or given.min() < 0 or pair_id.min() < 0 or pair_id.max() >= num_samples:
        raise UserError(f"--features={path}: given has to be 0 or larger, and pair_id from 0 to {num_samples - 1}.")
    num_classes = max(2, int(given.max()) + 1, int(true.max()) + 1)
    # Classes of C and larger belong to open-set samples, each of its own class.
    true = np.where(true < 0, num_classes + np.arange(num_samples), true)
    return CoverageData(
        num_classes=num_classes,
        visual=torch.from_numpy(arrays["visual"].astype(np.float32)),
        audio=torch.from_numpy(arrays["audio"].astype(np.float32)),
        given=given,
        true=true,
        visual_class=true,
        audio_class=true[pair_id],
        pair_id=pair_id,
        groups=groups,
    )


def score_file(path: Path) -> dict[str, Any]:
    """Return the scores of the samples of a file, in a family of their own."""
    return rounded({"name": path.stem, "family": FAMILY, **score_data(load(path))})
