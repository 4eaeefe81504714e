"""The fused path of the global batch normalization, with CPU implementations of its four CUDA operators.

The implementations check the arguments: they reject types and layouts that the kernels reject or compute wrongly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import library as operators

from distav.models.blocks import recompute_activations
from distav.models.layers import GlobalBatchNorm, _FusedGlobalNormalize, _GlobalNormalize
from tests.helpers.normalization import normalized
from tests.helpers.on_gpu import OnGPU
from tests.helpers.spawn import on_ranks

FLOAT = torch.float32
LAYOUTS = {"channels last": torch.channels_last_3d, "contiguous": torch.contiguous_format}


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), _dims(x), correction=0)
    return mean, (var + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    assert weight.dtype == bias.dtype and weight.dtype in (x.dtype, FLOAT) and mean.dtype == invstd.dtype == FLOAT
    scaled = (x.float() - _broadcast(mean, x)) * _broadcast(weight.float() * invstd, x)
    return torch.empty_like(x).copy_(scaled + _broadcast(bias.float(), x))


def backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, input_g: bool, weight_g: bool, bias_g: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert grad.dtype == x.dtype and grad.stride() == x.stride() and weight.dtype in (x.dtype, FLOAT)
    assert x.stride(1) == 1  # For other layouts the kernel rounds partial sums to the type of the input.
    assert input_g and weight_g and bias_g
    sum_dy = grad.float().sum(_dims(x))
    sum_dy_xmu = (grad.float() * (x.float() - _broadcast(mean, x))).sum(_dims(x))
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * invstd).to(weight.dtype), sum_dy.to(weight.dtype)


def backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:  # fmt: skip
    assert grad.dtype == x.dtype and grad.stride() == x.stride() and count.dtype == torch.int32
    assert weight.dtype == FLOAT and sum_dy.is_contiguous() and sum_dy_xmu.is_contiguous()
    total = count.sum()
    centered = (x.float() - _broadcast(mean, x)) * _broadcast(invstd**2 * sum_dy_xmu / total, x)
    grad_x = (grad.float() - _broadcast(sum_dy / total, x) - centered) * _broadcast(weight * invstd, x)
    return torch.empty_like(x).copy_(grad_x)


OPERATORS = {
    "batch_norm_stats": stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


@contextmanager
def cpu_operators() -> Iterator[list[str]]:
    """Register the operators for the CPU within the context, which yields the names of all calls."""
    called: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return OPERATORS[name](*arguments)

        return call

    with operators._scoped_library("aten", "IMPL", "CPU") as registry:
        for name in OPERATORS:
            registry.impl(name, recorded(name))
        yield called


@pytest.fixture(autouse=True)
def called() -> Iterator[list[str]]:
    with cpu_operators() as called:
        yield called


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (6, 5, 3, 4, 2)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 10
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return x.to(dtype), weight, bias, torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameters", [FLOAT, torch.bfloat16])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16])
def test_the_fused_path_equals_the_plain_one(dtype: torch.dtype, parameters: torch.dtype, layout: str):
    x, weight, bias, grad = inputs(dtype)
    weight, bias = weight.to(parameters), bias.to(parameters)
    expected = normalized(_GlobalNormalize, x.float(), weight.float(), bias.float(), grad.float())
    x = x.contiguous(memory_format=LAYOUTS[layout])
    fused = normalized(_FusedGlobalNormalize, x, weight, bias, grad)
    assert fused[0].shape == x.shape and fused[0].stride(1) == 1
    dtypes = [dtype, FLOAT, FLOAT, dtype, parameters, parameters]
    for ours, theirs, result_dtype in zip(fused, expected, dtypes, strict=True):
        assert ours.dtype == result_dtype
        tolerance = 2e-2 if result_dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1)])
def test_features_are_normalized_equally(shape: tuple[int, ...]):
    arguments = inputs(FLOAT, shape)
    for ours, theirs in zip(
        normalized(_FusedGlobalNormalize, *arguments), normalized(_GlobalNormalize, *arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_input_is_the_only_saved_tensor_of_its_size():
    x, weight, bias, _ = inputs(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        _FusedGlobalNormalize.apply(x.requires_grad_(), weight, bias, 1e-5)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() > x.shape[1]] == [x.data_ptr()]


def normalize_on_each_rank(dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, grad = inputs(dtype)
    rows = slice(3 * torch.distributed.get_rank(), 3 * torch.distributed.get_rank() + 3)
    with cpu_operators():
        return normalized(_FusedGlobalNormalize, x[rows], weight, bias, grad[rows])


def test_two_ranks_normalize_over_the_global_batch():
    expected = normalized(_GlobalNormalize, *inputs(FLOAT))
    first, second = on_ranks(2, normalize_on_each_rank, FLOAT)
    results = [torch.cat([first[at], second[at]]) if at in (0, 3) else first[at] for at in range(4)]
    results += [first[at] + second[at] for at in (4, 5)]
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_running_statistics_count_a_batch_once_and_ignore_channels_that_are_not_finite(on_gpu: bool, called: list[str]):
    x = inputs(torch.bfloat16 if on_gpu else FLOAT)[0]
    layer = GlobalBatchNorm(5).to(x.dtype)
    recompute_activations(layer)

    def train(x: Tensor) -> None:
        x = x.clone().requires_grad_()
        layer(x.as_subclass(OnGPU) if on_gpu else x).sum().backward()

    train(x)
    assert called.count("batch_norm_stats") == 2 * on_gpu and called.count("batch_norm_backward_elemt") == on_gpu
    assert layer.running_mean.dtype == layer.running_var.dtype == FLOAT
    var, mean = torch.var_mean(x.float(), _dims(x), correction=1)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var, rtol=1e-4, atol=1e-5)
    before = layer.running_mean.clone(), layer.running_var.clone()
    x[0, 2, 0] = torch.inf
    train(x)
    invalid = torch.arange(5) == 2
    for old, new in zip(before, (layer.running_mean, layer.running_var), strict=True):
        assert torch.isfinite(new).all() and torch.equal(old[invalid], new[invalid]) and (old != new)[~invalid].all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 4, 3), (6, 5, 3, 4, 2)])
def test_an_activation_in_place_may_follow(shape: tuple[int, ...]):
    layers = torch.nn.Sequential(GlobalBatchNorm(5), torch.nn.ReLU(inplace=True))
    results = []
    for on_gpu in (False, True):
        x, *_, grad = inputs(FLOAT, shape)
        x.requires_grad_()
        out = layers(x.as_subclass(OnGPU) if on_gpu else x)
        out.backward(grad)
        results.append((out.detach().as_subclass(Tensor), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_evaluation_keeps_running_statistics_exact():
    x, weight, bias, _ = inputs(torch.bfloat16)
    layer = GlobalBatchNorm(5).eval()
    torch.nn.init.constant_(layer.running_mean, 10.011)
    exact = layer(x.float())
    cast = layer.to(torch.bfloat16)
    torch.nn.init.constant_(cast.running_mean, 10.011)  # The cast of the module has rounded it.
    assert cast(x).dtype == torch.bfloat16
    torch.testing.assert_close(cast(x), exact.bfloat16(), rtol=0, atol=0)
