"""Names of PyTorch that it does not document; other modules use them through this one.

`tests/unit/test_private_names.py` checks that PyTorch has them, with these arguments.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

_DEFAULT_GROUP = "0"


def flight_recorders(suffix: str = "") -> dict[str, Callable[..., bytes]]:
    """Return the functions of this build of PyTorch that read its flight recorders, by backend.

    Args:
        suffix: "_json" for functions that return JSON instead of the format of `torchfrtrace`.
    """
    names = {"gloo": f"_dump_fr_trace{suffix}", "nccl": f"_dump_nccl_trace{suffix}"}
    return {backend: getattr(c10d, name) for backend, name in names.items() if hasattr(c10d, name)}


def recorded_collectives() -> Iterator[tuple[bool, int, int]]:
    """Yield, for each process group and backend, whether it is the default group, and its last collectives.

    These are the numbers of the last collective that was begun and of the last one that finished. Reading them takes no
    lock and calls no CUDA function, so it never blocks.
    """
    for read_recorder in flight_recorders("_json").values():
        for group, status in json.loads(read_recorder(includeCollectives=False))["pg_status"].items():
            begun, finished = status["last_enqueued_collective"], status["last_completed_collective"]
            yield group == _DEFAULT_GROUP, int(begun), int(finished)


def is_in_collective(frame: FrameType) -> bool:
    """Return whether a frame is that of a function of torch.distributed, such as one that creates a group."""
    return frame.f_code.co_filename.endswith("distributed_c10d.py")


def group_timeout(group: Any = None) -> timedelta:
    """Return the timeout of the collectives of a process group on CPUs, by default of the default group."""
    group = group or dist.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout


def attend_flash_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with FlashAttention for CPUs.

    Args:
        q: queries [1, P, B, D].
        k: keys [1, P, n, D].
        v: values [1, P, n, D].
        mask: added to the scores, [1, P, B, n].
        scale: factor of the scores.

    Returns:
        Outputs [1, P, B, D], and log-partitions of the softmax [1, P, B].
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def attend_flash_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with FlashAttention for CUDA devices; see `attend_flash_cpu`."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with cuDNN; see `attend_flash_cpu`. The log-partitions are [1, P, B, 1] or [1, P, B]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse


@contextlib.contextmanager
def compiler_limits(max_compilations: int, num_processes: int) -> Iterator[None]:
    """Context in which a function is compiled at most so often, and by so many processes."""
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(recompile_limit=max_compilations),
        torch._inductor.config.patch(compile_threads=num_processes),
    ):
        yield


def vector_norms(tensors: Sequence[Tensor], order: float, dtype: torch.dtype) -> list[Tensor]:
    """Return the norm of each tensor, computed in `dtype` by one kernel."""
    return torch.ops.aten._foreach_norm.Scalar(list(tensors), order, dtype)
