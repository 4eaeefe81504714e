"""Checks of the tensors that a network gets: type and shape alone, so that no check waits for a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

FRAMES_LAYOUT = "[B, T, H, W, 3]"
AUDIO_LAYOUT = "[B, N]"


def check_frames(frames: Tensor, shape: Sequence[int | None] | None = None) -> None:
    """Check frames [B, T, H, W, 3] uint8; with `shape`, their T, H and W, which None leaves open.

    Raises:
        ValueError: naming the argument, what it is and what is allowed.
    """
    _check_tensor("frames", frames)
    if frames.dtype != torch.uint8:
        raise ValueError(
            f"frames: {_describe(frames)}; allowed: torch.uint8 {FRAMES_LAYOUT}, RGB from 0 to 255. The network "
            "normalizes the frames itself."
        )
    sizes = "x".join(str(size or "T") for size in shape or ())
    expected = FRAMES_LAYOUT + (f" with TxHxW = {sizes}" if shape else "")
    is_valid = frames.dim() == 5 and frames.shape[4] == 3
    has_shape = is_valid and all(size in (None, own) for own, size in zip(frames.shape[1:4], shape or (), strict=False))
    if not has_shape or not min(frames.shape[1:]):
        raise ValueError(f"frames: {_describe(frames)}; allowed: {expected}, channels last.")


def check_audio(audio: Tensor, min_samples: int = 1, num_samples: int | None = None) -> None:
    """Check audio [B, N] of a floating-point type; with `num_samples`, its N.

    Raises:
        ValueError: naming the argument, what it is and what is allowed.
    """
    _check_tensor("audio", audio)
    if not audio.is_floating_point():
        raise ValueError(
            f"audio: {_describe(audio)}; allowed: torch.float32 {AUDIO_LAYOUT} in [-1, 1]. Divide 16-bit samples by "
            "32768."
        )
    if audio.dim() != 2:
        raise ValueError(f"audio: {_describe(audio)}; allowed: {AUDIO_LAYOUT}, one channel per clip.")
    length = audio.shape[1]
    if num_samples is not None and length != num_samples:
        raise ValueError(f"audio: {_describe(audio)}; allowed: [B, {num_samples}], the length of the training clips.")
    if length < min_samples:
        raise ValueError(f"audio: {_describe(audio)}; allowed: {AUDIO_LAYOUT} with {min_samples} samples or more.")


def check_seeds(seeds: Tensor, batch: int | None = None) -> None:
    """Check seeds [B] int64; with `batch`, their number B.

    Raises:
        ValueError: naming the argument, what it is and what is allowed.
    """
    _check_tensor("seeds", seeds)
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or batch not in (None, len(seeds)):
        size = "B" if batch is None else batch
        raise ValueError(f"seeds: {_describe(seeds)}; allowed: torch.int64 [{size}], one number per clip.")


def check_stream(name: str, features: Tensor | None, batch: int, dim: int, steps: int | None = None) -> None:
    """Check a stream of features [B, steps, dim] of a floating-point type.

    Args:
        name: name of the stream.
        features: the features; None if the stream is missing.
        batch: B.
        dim: width of the features.
        steps: number of steps; None for any.

    Raises:
        ValueError: naming the stream, what it is and what is allowed.
    """
    expected = f"a floating-point tensor [{batch}, {steps or 'steps'}, {dim}]"
    if features is None:
        raise ValueError(f"{name}: this stream is missing; allowed: {expected}.")
    _check_tensor(name, features)
    expected_shape = (batch, steps or features.shape[1], dim) if features.dim() == 3 else None
    if features.shape != expected_shape or not features.shape[1] or not features.is_floating_point():
        raise ValueError(f"{name}: {_describe(features)}; allowed: {expected}.")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: {type(value).__name__}; allowed: a torch.Tensor, such as torch.from_numpy({name}).")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
