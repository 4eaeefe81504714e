"""Interpretation of DALI's error messages: whether a clip or the device failed, and why."""

import re

import torch


class DeviceError(RuntimeError):
    """The device failed while it decoded a batch, for a reason that no clip causes."""


def dali_reason(message: str) -> str:
    """Return the cause from an error message of DALI: the first line after "encountered:"."""
    details = message.partition("encountered:")[2] or message
    lines = [line.strip() for line in details.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Critical error in pipeline", "Current pipeline"))]
    return lines[0] if lines else "the decoder gave no reason"


def is_out_of_memory(reason: str) -> bool:
    """Return whether a failure means that memory is exhausted."""
    pattern = r"out of memory|allocation failed|OUT_OF_MEMORY|MemoryAllocation|bad_alloc|nvImageCodec failure: '#5'"
    return bool(re.search(pattern, reason))


def is_device_failure(reason: str, device: torch.device) -> bool:
    """Return whether the device failed: memory is exhausted, or a GPU has stopped responding."""
    if is_out_of_memory(reason):
        return True
    if device.type != "cuda" or "libnvcuvid" in reason:
        return bool(re.search(r"CUDA|cuda[A-Z]|libnvcuvid|libcuda", reason))
    try:
        torch.cuda.current_stream(device).synchronize()
    except RuntimeError:
        return True
    return False
