"""Take the way of a GPU on the CPU, where the operators of both can be had."""

import torch
from torch import Tensor


class OnGPU(Tensor):
    """A tensor of the CPU that says it is on a GPU; what is computed from it says so no more."""

    is_cuda = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
