import math

import pytest
import torch

from distav.memory.attention import AttentionInputs, reference_attention, tiled_attention
from distav.memory.softmax import attend
from tests.helpers.bank import unit

SHAPES = [(3, 50, 16), (8, 64, 64), (5, 1, 8), (2, 130, 128), (300, 2051, 24), (17, 1023, 20), (1, 4097, 8)]


@pytest.mark.parametrize("backend", ["flash-cpu", "tiles"])
@pytest.mark.parametrize(("num_queries", "num_rows", "dim"), SHAPES)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_equals_the_reference(
    backend: str, num_queries: int, num_rows: int, dim: int, temperature: float, with_bias: bool, dtype: torch.dtype
):
    queries, keys, values = unit(num_queries, dim), unit(num_rows, dim, seed=1), unit(num_rows, dim, seed=2)
    keys, values = keys.to(dtype), values.to(dtype)
    keys[num_rows // 2 :] = keys[: num_rows - num_rows // 2].clone()  # duplicates of every key
    bias = torch.linspace(-3, 3, num_rows) if with_bias else None
    if bias is not None:
        bias[::3] = -math.inf if num_rows > 1 else 0.0
    if backend == "flash-cpu" and dim % 8:
        with pytest.raises(ValueError, match="backend=flash-cpu does not support these inputs; supported: tiles"):
            attend(queries, keys, values, temperature, bias=bias, backend=backend)
        return
    lse, out = attend(queries, keys, values, temperature, bias=bias, backend=backend)
    expected_lse, expected_out = reference_attention(AttentionInputs(queries, keys, values, 1 / temperature, bias))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-4, atol=2e-5)


def test_attend_masks_excluded_rows():
    queries, keys = unit(4, 8), unit(20, 8, seed=1)
    exclude = torch.tensor([[3, 4], [-1, -1], [19, -1], [0, 0]])
    inputs = AttentionInputs(queries, keys, keys, 10.0, None, exclude)
    output = tiled_attention(inputs, tile=6)
    for actual, expected in zip(output, reference_attention(inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(queries, keys, keys, 0.1, exclude=exclude), output)
    for backend in ("flash-cpu", "tiles"):
        lse, out = attend(queries, keys, keys, 0.1, bias=torch.full((20,), -math.inf), backend=backend)
        assert (lse == -math.inf).all() and (out == 0).all()


@pytest.mark.parametrize("backend", ["flash-cpu", "tiles"])
def test_a_tensor_temperature_equals_a_number(backend: str):
    queries, keys = unit(20, 16), unit(2500, 16, seed=1)
    output = attend(queries, keys, keys, torch.tensor(0.07), backend=backend)
    for actual, expected in zip(output, attend(queries, keys, keys, 0.07, backend=backend), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_attend_rejects_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        attend(unit(2, 8), unit(3, 8), unit(3, 8), 0.0)


def test_attend_rejects_an_unknown_backend():
    with pytest.raises(ValueError, match="backend=unknown .* supported: flash-cpu, tiles"):
        attend(unit(2, 8), unit(3, 8), unit(3, 8), 1.0, backend="unknown")
