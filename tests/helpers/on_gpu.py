"""Tensors that select the GPU code path on a CPU, where its operators also exist for the CPU."""

import torch
from torch import Tensor


class OnGPU(Tensor):
    """A CPU tensor with `is_cuda` = True; tensors computed from it are ordinary CPU tensors."""

    is_cuda = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
