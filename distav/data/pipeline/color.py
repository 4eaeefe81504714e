"""Color augmentation of clips on a CPU.

A change of brightness, contrast, saturation and hue is one affine map of RGB. On a CPU it is computed here, with the
values of DALI's `color_twist`, because that operator takes about as long there as decoding and resizing together.
Legend: B clips, T frames, H W pixels.
"""

import math

import numpy as np

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
"""RGB to YIQ, in which hue is an angle and saturation a length."""
_CENTER = 128.0
"""Level that a change of contrast does not modify."""
_PIXELS = 16
"""Pixels per product: matrices of 3 x 3 are too small for a fast matrix product."""
_ROWS = 112
"""Rows of a product. From 2^18 multiplications on, OpenBLAS starts threads, which would compete with training."""


def color_transforms(color: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine maps of RGB levels.

    Args:
        color: [B, 4] factors of brightness, contrast and saturation, and a rotation of the hue in degrees.

    Returns:
        Matrices [B, 3, 3] and offsets [B, 3] float32: a pixel p becomes matrix p + offset.
    """
    brightness, contrast, saturation, degrees = np.asarray(color, np.float64).T
    hue = np.zeros((len(brightness), 3, 3))
    hue[:, 0, 0] = 1
    hue[:, 1, 1] = hue[:, 2, 2] = saturation * np.cos(np.deg2rad(degrees))
    hue[:, 1, 2] = saturation * np.sin(np.deg2rad(degrees))
    hue[:, 2, 1] = -hue[:, 1, 2]
    matrix = (brightness * contrast)[:, None, None] * (np.linalg.inv(_YIQ) @ hue @ _YIQ)
    offset = np.repeat((_CENTER * (1 - contrast) * brightness)[:, None], 3, axis=1)
    return matrix.astype(np.float32), offset.astype(np.float32)


def change_colors(frames: np.ndarray, color: np.ndarray) -> None:
    """Change the colors of clips in place; levels are rounded to the nearest integer and clipped to 0..255.

    Args:
        frames: [B, T, H, W, 3] uint8, contiguous.
        color: [B, 4], see `color_transforms`; a clip whose row is (1, 1, 1, 0) is not modified.
    """
    if not len(frames):
        return
    matrices, offsets = color_transforms(color)
    group = math.gcd(frames[0].size // 3, _PIXELS)
    pixels = frames.reshape(len(frames), -1, 3 * group)
    blocked = frames[0].size // (3 * group) // _ROWS * _ROWS  # Rows that fill blocks of _ROWS; the rest is one block.
    parts = [pixels[:, :blocked].reshape(len(frames), -1, _ROWS, 3 * group), pixels[:, blocked:]]
    buffers = [[np.empty(part.shape[1:], np.float32) for _ in range(2)] for part in parts]
    for clip in (color != (1, 1, 1, 0)).any(axis=1).nonzero()[0]:
        block = np.kron(np.eye(group, dtype=np.float32), matrices[clip].T)
        offset = np.tile(offsets[clip], group) + np.float32(0.5)  # The conversion to uint8 truncates.
        for part, (source, levels) in zip(parts, buffers, strict=True):
            source[...] = part[clip]
            np.matmul(source, block, out=levels)
            levels += offset
            np.minimum(levels, 255, out=levels)
            part[clip] = np.maximum(levels, 0, out=levels)
