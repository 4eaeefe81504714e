"""Layers whose result does not depend on how the batch is cut into ranks.

Legend: B rows of this rank, C channels.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distav.distributed.collectives import all_gather_rows, all_reduce_sum_, get_world_size
from distav.distributed.rng import uniform

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
"""Whether activations are being computed a second time; running statistics have counted the batch then."""


class _GlobalNormalise(torch.autograd.Function):
    """Batch normalisation over the rows of all ranks: one exchange of statistics forward, one of sums backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(x.float())
        stats = all_gather_rows(torch.stack([mean, var])[None])
        mean = stats[:, 0].mean(0)
        var = (stats[:, 1] + (stats[:, 0] - mean) ** 2).mean(0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        given = mean.to(weight.dtype), var.to(weight.dtype)
        return F.batch_norm(x, *given, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        shape, dims = [1, -1] + [1] * (x.dim() - 2), [0, *range(2, x.dim())]
        rstd = (var + ctx.eps).rsqrt()
        grad, centred = gradients[0].float(), x.float() - mean.view(shape)
        bias_grad, weight_grad = grad.sum(dims), (grad * centred).sum(dims) * rstd
        count = x.numel() // x.shape[1] * get_world_size()
        of_bias, of_weight = all_reduce_sum_(torch.stack([bias_grad, weight_grad])) / count
        grad_x = (grad - of_bias.view(shape)).addcmul_(centred, (of_weight * rstd).view(shape), value=-1)
        grad_x = grad_x.mul_((weight.float() * rstd).view(shape)).to(x.dtype)
        return grad_x, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None


class _FusedGlobalNormalise(torch.autograd.Function):
    """`_GlobalNormalise` by the CUDA kernels of PyTorch's SyncBatchNorm, which accumulate in float32.

    Device memory traffic of one bfloat16 element is 22 bytes with recomputation: a forward pass moves 6 (the statistics
    read 2, the normalization reads 2 and writes 2), and there are two; the backward pass moves 10 (the sums read 4, the
    gradient reads 4 and writes 2). The input is the only tensor of its size that is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=_memory_format(x))
        means, invstds = all_gather_rows(torch.stack(torch.batch_norm_stats(x, eps))[None]).unbind(1)
        # All ranks have the same number of elements, so counts of one give the same result; the kernel sums counts in
        # 32 bits, which the true ones overflow at some hundred ranks. The first argument sets the type of the counts.
        counts = torch.ones(len(means), device=x.device)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(means, means, invstds, None, None, 0.0, eps, counts)
        ctx.save_for_backward(x, weight, mean, invstd)
        var = invstd.pow(-2).sub_(eps).clamp_min_(0)
        ctx.mark_non_differentiable(mean, var)
        # The kernels accept parameters in float32 for any input.
        return torch.batch_norm_elemt(x, weight.float(), bias.float(), mean, invstd, eps), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, invstd = ctx.saved_tensors
        # With a layout other than the input's, every kernel would copy the gradient.
        grad, scale = gradients[0].contiguous(memory_format=_memory_format(x)), weight.float()
        of_bias, of_weight, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, scale, True, True, True
        )
        of_bias, of_weight = all_reduce_sum_(torch.stack([of_bias, of_weight]))
        counts = torch.full((get_world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, scale, of_bias, of_weight, counts)
        return grad_x, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format that a tensor has already, channels last or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of [B, C, ...] float32.

    Each sample's part is summed in float32, the parts in float64; on a CPU that takes a seventh of `var_mean`'s time.
    """
    each = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    count = each.shape[0] * each.shape[2]
    mean = each.sum(2).double().sum(0) / count
    square = torch.linalg.vecdot(each, each).double().sum(0) / count
    return mean.float(), (square - mean**2).clamp_min(0).float()


class GlobalBatchNorm(nn.Module):
    """Batch normalisation whose statistics are those of the global batch, on CPUs as on GPUs.

    On a GPU the kernels of PyTorch's SyncBatchNorm compute it. On a CPU PyTorch's own is not used in training even on
    one rank: its sums over 10^5 values are off by 10^-4, and training makes another run of that. All ranks bring
    batches of one size. Running statistics stay in float32 whatever the model is cast to.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        # Cast, since what is made under ZeRO-3 is made in the precision of training.
        self.register_buffer("running_mean", torch.zeros(channels).float())
        self.register_buffer("running_var", torch.ones(channels).float())

    def _apply(self, fn: Any, recurse: bool = True) -> "GlobalBatchNorm":
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...] per channel."""
        if not self.training:
            weight, bias = self.weight.float(), self.bias.float()
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        normalize = _FusedGlobalNormalise if x.is_cuda else _GlobalNormalise
        out, mean, var = normalize.apply(x, self.weight, self.bias, self.eps)  # pyright: ignore[reportGeneralTypeIssues]
        if _recomputing.get():
            return out
        count = x.numel() // x.shape[1] * get_world_size()
        with torch.no_grad():
            finite = torch.isfinite(mean) & torch.isfinite(var)  # One bad batch must not stay in them for ever.
            var = var * count / max(1, count - 1)
            self.running_mean.lerp_(torch.where(finite, mean, self.running_mean), self.momentum)
            self.running_var.lerp_(torch.where(finite, var, self.running_var), self.momentum)
        return out


class SeededDropout(nn.Module):
    """Dropout whose mask hangs on the seed of each row."""

    def __init__(self, rate: float, stream: int):
        super().__init__()
        self.rate, self.stream = rate, stream

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Drop entries of [B, C] with the seeds [B] int64; nothing in evaluation."""
        if not self.training or not self.rate:
            return x
        kept = uniform(seeds, self.stream, x.shape[1]) >= self.rate
        return x * kept / max(1 - self.rate, 1e-6)


def with_global_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation of a network by the global one."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, GlobalBatchNorm(child.num_features, child.eps, child.momentum or 0.1))
        else:
            with_global_batch_norm(child)
    return module


@contextlib.contextmanager
def _recomputation() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)


def _contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _recomputation()


def run(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """Apply blocks in turn; with `recompute`, their activations are computed again in the backward pass."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = cast(Tensor, checkpoint(block, x, use_reentrant=False, context_fn=_contexts))
        else:
            x = block(x)
    return x
