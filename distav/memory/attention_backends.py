"""Attention backends, their self-tests, and the selection of one for given inputs.

The fused operators of PyTorch that return the log-partition are private. Each is therefore compared with the
reference before its first use; where one is missing or wrong, the next backend is used and the log reports why.
Legend: B queries, n keys, D width, E excluded keys per query.
"""

import functools
import logging
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.memory import fused_attention
from distav.memory.attention import AttentionInputs, reference_attention, tiled_attention
from distav.memory.fused_attention import AttentionFunction

log = logging.getLogger("distav")

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class AttentionBackend:
    """An implementation of attention and the inputs that it supports.

    Attributes:
        name: name in `attend` and in the log.
        run: computes the attention.
        device: required type of device; any if empty.
        dtypes: supported types of the keys.
        supports_bias, supports_exclude: whether a bias and excluded keys are supported.
        widths: supported D.
        min_keys: smallest supported n.
    """

    name: str
    run: AttentionFunction
    device: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    supports_bias: bool = True
    supports_exclude: bool = True
    widths: range = range(1, 2**20)
    min_keys: int = 0

    def unsupported_reason(self, inputs: AttentionInputs) -> str:
        """Return why the backend cannot be used for the inputs; an empty string if it can.

        The fused operators check few of these conditions themselves: PyTorch checks the others in `sdp_utils.cpp`,
        where it chooses among them.
        """
        keys, values, width = inputs.keys, inputs.values, inputs.keys.shape[1]
        if self.device not in ("", keys.device.type):
            return f"needs {self.device}"
        if keys.dtype not in self.dtypes:
            return f"does not support {_dtype_name(keys.dtype)}"
        if inputs.bias is not None and not self.supports_bias:
            return "does not support a bias"
        if inputs.exclude is not None and not self.supports_exclude:
            return "does not support excluded keys"
        if width not in self.widths:
            return f"needs a width from {self.widths[0]} to {self.widths[-1]} in steps of {self.widths.step}"
        if len(keys) < self.min_keys:
            return f"needs at least {self.min_keys} keys"
        if self.device and keys.shape != values.shape:
            return "needs values as wide as the keys"
        if self.device == "cuda" and not (_is_aligned(keys) and _is_aligned(values)):
            return f"needs rows aligned to {_ALIGNMENT_BYTES} bytes"
        return ""

    def supports(self, inputs: AttentionInputs) -> bool:
        """Whether the backend can be used for the inputs."""
        return not self.unsupported_reason(inputs)


def _is_aligned(rows: Tensor) -> bool:
    """Whether every row is contiguous and starts at a multiple of 16 bytes."""
    offsets = rows.storage_offset(), rows.stride(0)
    return rows.stride(1) == 1 and all(offset * rows.element_size() % _ALIGNMENT_BYTES == 0 for offset in offsets)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BACKENDS = (
    AttentionBackend(
        "cudnn", fused_attention.cudnn, "cuda", (torch.bfloat16,), False, False, range(8, 129, 8), min_keys=2
    ),
    AttentionBackend(
        "flash", fused_attention.flash_cuda, "cuda", (torch.bfloat16,), False, False, range(8, 257, 8), min_keys=1
    ),
    AttentionBackend("flex", fused_attention.flex, "cuda", (torch.bfloat16,), widths=range(16, 257, 8), min_keys=1),
    AttentionBackend(
        "flash-cpu", fused_attention.flash_cpu, "cpu", (torch.float32,), True, False, range(8, 2**20, 8), min_keys=1
    ),
    AttentionBackend("tiles", tiled_attention),
)
"""All backends in order of preference; the last one supports all inputs."""


@functools.cache
def self_test(backend: AttentionBackend, device: torch.device, width: int, with_bias: bool, num_excluded: int) -> str:
    """Compare a backend with the reference on 300 queries and 2,500 keys; a failure is logged once.

    Args:
        backend: backend to test, with keys of the first of its dtypes.
        device: device to test on.
        width: D.
        with_bias: whether to pass a bias.
        num_excluded: E, 0 for none.

    Returns:
        What is wrong with the backend on this device; an empty string if it is correct.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2800, width, generator=generator), dim=1)
    dtype = backend.dtypes[0]
    queries, keys = rows[:300].to(device, dtype), rows[300:].to(device, dtype)
    bias = torch.linspace(-1, 1, 2500, device=device) if with_bias else None
    exclude = torch.arange(300 * num_excluded, device=device).view(300, -1) % 2500 if num_excluded else None
    inputs = AttentionInputs(queries, keys, keys, 10.0, bias, exclude)
    tolerance, failure = 1e-4 if dtype is torch.float32 else 2e-2, ""
    try:
        lse, out = backend.run(inputs)
        expected_lse, expected_out = reference_attention(inputs)
        lse_error, out_error = float((lse - expected_lse).abs().max()), float((out - expected_out).abs().max())
        if not (lse_error < tolerance and out_error < tolerance):
            failure = f"lse error {lse_error:.2g}, output error {out_error:.2g}, allowed {tolerance:g}"
    except Exception as error:  # noqa: BLE001  # a private operator may raise anything
        failure = f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"
    if failure:
        log.warning(
            "attention backend '%s' failed its self-test on %s with width %d and will not be used: %s",
            backend.name,
            device,
            width,
            failure,
        )
    return failure


def select_backend(inputs: AttentionInputs) -> AttentionBackend:
    """Return the first backend that supports the inputs and passes its self-test.

    The choice is logged once for each device, dtype and form of the inputs, with the reason why each preferred
    backend of the device is not used.
    """
    keys, with_bias = inputs.keys, inputs.bias is not None
    num_excluded = 0 if inputs.exclude is None else inputs.exclude.shape[1]
    rejected: list[str] = []
    for backend in BACKENDS:
        reason = backend.unsupported_reason(inputs)
        if not reason and backend.device:
            reason = self_test(backend, keys.device, keys.shape[1], with_bias, num_excluded)
        if not reason:
            form = f"{keys.device}, {_dtype_name(keys.dtype)}, width {keys.shape[1]}"
            form += ", bias" if with_bias else ""
            form += f", {num_excluded} excluded" if num_excluded else ""
            _log_selection(backend.name, form, tuple(rejected))
            return backend
        if backend.device == keys.device.type:
            rejected.append(f"{backend.name} ({reason})")
    raise AssertionError("the last backend supports all inputs")


@functools.cache
def _log_selection(name: str, form: str, rejected: tuple[str, ...]) -> None:
    not_used = f"; not used: {', '.join(rejected)}" if rejected else ""
    log.info("attention backend '%s' selected for %s%s", name, form, not_used)
