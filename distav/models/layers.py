"""Layers with results that do not depend on the number of ranks that divide a batch.

Legend: B rows of this rank, C channels.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.distributed.collectives import all_reduce_sum_, get_world_size
from distav.distributed.rng import uniform

_is_recomputing = [False]
"""Whether activations are being recomputed; the running statistics already include the batch then. Not a context
variable, which torch.compile cannot trace; forward and backward passes never run at the same time."""


class _GlobalNormalize(torch.autograd.Function):
    """Batch normalization over the rows of all ranks, with one collective in each of the two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _global_moments(*_moments(x.float()))
        mean, var = mean.float(), var.float()
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        out = F.batch_norm(x, mean.to(weight.dtype), var.to(weight.dtype), weight, bias, False, 0.0, eps)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        shape, dims = [1, -1] + [1] * (x.dim() - 2), [0, *range(2, x.dim())]
        rstd = (var + ctx.eps).rsqrt()
        grad, centered = gradients[0].float(), x.float() - mean.view(shape)
        bias_grad, weight_grad = grad.sum(dims), (grad * centered).sum(dims) * rstd
        count = x.numel() // x.shape[1] * get_world_size()
        mean_bias_grad, mean_weight_grad = all_reduce_sum_(torch.stack([bias_grad, weight_grad])) / count
        grad_x = (grad - mean_bias_grad.view(shape)).addcmul_(centered, (mean_weight_grad * rstd).view(shape), value=-1)
        grad_x = grad_x.mul_((weight.float() * rstd).view(shape)).to(x.dtype)
        return grad_x, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None


class _FusedGlobalNormalize(torch.autograd.Function):
    """`_GlobalNormalize` with the CUDA kernels of PyTorch's SyncBatchNorm.

    Tensors with channels last are required: for other layouts, the kernel of the backward pass rounds every partial sum
    to the type of the input, and weight gradients in bfloat16 have errors of 1 %.
    Device memory traffic of one bfloat16 element is 22 bytes with recomputation: a forward pass moves 6 (the statistics
    read 2, the normalization reads 2 and writes 2), and there are two; the backward pass moves 10 (the sums read 4, the
    gradient reads 4 and writes 2). The input is the only tensor of its size that is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        x = _channels_last(x)
        mean, invstd = torch.stack(torch.batch_norm_stats(x, eps)).double()
        mean, var = _global_moments(mean, torch.addcmul(invstd.pow(-2).sub_(eps), mean, mean))
        mean, var, invstd = mean.float(), var.float(), (var + eps).rsqrt().float()
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        # The kernels accept parameters in float32 for any input.
        return torch.batch_norm_elemt(x, weight.float(), bias.float(), mean, invstd, eps), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, invstd = ctx.saved_tensors
        grad, scale = _channels_last(gradients[0]), weight.float()
        sum_grad, sum_product, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, scale, True, True, True
        )
        sum_grad, sum_product = all_reduce_sum_(torch.stack([sum_grad, sum_product]))
        counts = torch.full((get_world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, scale, sum_grad, sum_product, counts)
        return grad_x, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None


def _channels_last(x: Tensor) -> Tensor:
    """Return [B, C], [B, C, H, W] or [B, C, T, H, W] with channels last in memory."""
    formats = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of the values and of the squares of each channel of [B, C, ...] float32, in float64.

    Sums of each sample are in float32, sums over samples in float64. On a CPU that takes a seventh of the time of
    `torch.var_mean`.
    """
    samples = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    count = samples.shape[0] * samples.shape[2]
    mean = samples.sum(2).double().sum(0) / count
    return mean, torch.linalg.vecdot(samples, samples).double().sum(0) / count


def _global_moments(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over all ranks, which have equal numbers of values.

    One reduction of 2 C numbers takes a time that grows with the logarithm of the number of ranks. The time and the
    size of a gathering of statistics would be proportional to it.

    Args:
        mean, square: [C] float64, means of the values and of the squares of this rank.
    """
    mean, square = all_reduce_sum_(torch.stack([mean, square])) / get_world_size()
    return mean, torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)


class GlobalBatchNorm(nn.Module):
    """Batch normalization with the statistics of the global batch, on CPUs and GPUs.

    It differs from `torch.nn.SyncBatchNorm` as follows. It also runs on a CPU, where it is used in training even with
    one rank: sums of `torch.nn.BatchNorm` over 10^5 values have errors of 10^-4, which change the course of training.
    All ranks must have batches of the same size. Running statistics stay in float32 when the model is cast, keep the
    previous value of a channel with statistics that are not finite, and count a batch once under activation
    checkpointing.

    Attributes:
        uses_batch: whether training uses the statistics of the batch; otherwise the running statistics are constant.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum, self.uses_batch = eps, momentum, True
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        # Under ZeRO-3, new tensors have the precision of training.
        self.register_buffer("running_mean", torch.zeros(channels).float())
        self.register_buffer("running_var", torch.ones(channels).float())

    def _apply(self, fn: Any, recurse: bool = True) -> "GlobalBatchNorm":
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B, C, ...] per channel."""
        if not (self.training and self.uses_batch):
            weight, bias = self.weight.float(), self.bias.float()
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        if x.dim() == 3:  # Channels last exists for four and five dimensions.
            return self(x.unsqueeze(3)).squeeze(3)
        normalize = _FusedGlobalNormalize if x.is_cuda else _GlobalNormalize
        out, mean, var = normalize.apply(x, self.weight, self.bias, self.eps)  # pyright: ignore[reportGeneralTypeIssues]
        if _is_recomputing[0]:
            return out
        count = x.numel() // x.shape[1] * get_world_size()
        with torch.no_grad():
            finite = torch.isfinite(mean) & torch.isfinite(var)  # Running statistics never recover from NaN.
            var = var * count / max(1, count - 1)
            self.running_mean.lerp_(torch.where(finite, mean, self.running_mean), self.momentum)
            self.running_var.lerp_(torch.where(finite, var, self.running_var), self.momentum)
        return out


class SeededDropout(nn.Module):
    """Dropout with a mask that depends on the seed of each row alone."""

    def __init__(self, rate: float, stream: int):
        super().__init__()
        self.rate, self.stream = rate, stream

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Apply dropout to [B, C] in training, with the seeds [B] int64; the identity in evaluation."""
        if not self.training or not self.rate:
            return x
        kept = uniform(seeds, self.stream, x.shape[1]) >= self.rate
        return x * kept / max(1 - self.rate, 1e-6)


class _GlobalBatchNormAct(GlobalBatchNorm):
    """`GlobalBatchNorm` with the activation that timm's batch normalization includes."""

    def __init__(self, channels: int, eps: float, momentum: float, act: nn.Module):
        super().__init__(channels, eps, momentum)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def with_global_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalization inside a module by `GlobalBatchNorm`, and return the module.

    Weights and running statistics start at their defaults.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            options = (child.num_features, child.eps, child.momentum or 0.1)
            act = getattr(child, "act", None)
            norm = GlobalBatchNorm(*options) if act is None else _GlobalBatchNormAct(*options, act)
            setattr(module, name, norm)
        else:
            with_global_batch_norm(child)
    return module


def without_dropout(module: nn.Module) -> nn.Module:
    """Switch off every dropout inside a module, whose random numbers would depend on the number of ranks."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    """Inside, activations are recomputed, and running statistics already include the batch."""
    before, _is_recomputing[0] = _is_recomputing[0], True
    try:
        yield
    finally:
        _is_recomputing[0] = before
