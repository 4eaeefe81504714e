"""Bands of pixel rows that crops need, so that a JPEG image is decoded in part.

Legend: B clips.
"""

from collections.abc import Sequence

import numpy as np

from distav.data.pipeline.augmentation import ClipTransform


def crop_bands(transforms: Sequence[ClipTransform], crops: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixel rows that the crops need, and the crops in pixels of the decoded bands.

    A JPEG image is coded row by row, so decoding fewer columns saves nothing. The margin is what the antialiasing
    filter reads beyond a crop.

    Args:
        transforms: B transforms.
        crops: [B, 4] top, left, bottom, right as fractions of height and width.
        size: S.

    Returns:
        [B, 2] int32 first row and the row after the last, and [B, 4] float32.
    """
    height, width = np.array([transform.size for transform in transforms]).T
    top, left, bottom, right = (crops * np.stack([height, width, height, width], axis=1)).T
    margin = np.maximum(1, (bottom - top) / size) + 2
    first = np.maximum(0, np.floor(top - margin))
    last = np.minimum(height, np.ceil(bottom + margin))
    bands = np.stack([first, last], axis=1).astype(np.int32)
    return bands, np.stack([top - first, left, bottom - first, right], axis=1).astype(np.float32)
