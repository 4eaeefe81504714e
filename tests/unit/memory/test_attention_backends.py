"""Selection of the attention backend, what the log reports about it, and how often FlexAttention is compiled."""

import functools
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from distav.memory import attention_backends, fused_attention
from distav.memory.attention import AttentionInputs, reference_attention, tiled_attention
from distav.memory.attention_backends import BACKENDS, AttentionBackend, select_backend
from tests.helpers.bank import unit

FLEX = next(backend for backend in BACKENDS if backend.name == "flex")


@pytest.fixture
def log_records() -> Iterator[list[logging.LogRecord]]:
    """Records of the distav logger; self-tests and selections of earlier tests are forgotten."""

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    records: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("distav"), Recorder()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    attention_backends.self_test.cache_clear()
    attention_backends._log_selection.cache_clear()
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def compile_counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts compilations; compiles for a CPU without a C++ compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    fused_attention._compiled_flex.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    fused_attention._compiled_flex.cache_clear()


@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_flex_attention_is_compiled_once_for_all_temperatures(
    with_bias: bool, with_exclude: bool, compile_counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fused_attention, "_num_parts", lambda queries, num_keys: num_keys // 100)
    temperatures = [0.02 + 0.01 * number for number in range(14)]
    for number, temperature in enumerate([*temperatures, torch.tensor(0.5), torch.tensor(0.6)]):
        num_queries, num_keys = 20 + number % 3, 300 + 41 * number  # 3 to 9 parts and a remainder
        queries, keys, values = unit(num_queries, 16), unit(num_keys, 16, seed=1), unit(num_keys, 16, seed=2)
        bias = torch.linspace(-2, 2, num_keys) if with_bias else None
        exclude = torch.randint(-1, num_keys, (num_queries, 1)) if with_exclude else None
        if exclude is not None:
            exclude[0] = num_keys - 1  # a key of the remainder
        inputs = AttentionInputs(queries, keys, values, 1 / temperature, bias, exclude)
        for actual, expected in zip(FLEX.run(inputs), reference_attention(inputs), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert compile_counter.frame_count == 1


@pytest.mark.long
def test_flex_attention_is_compiled_for_more_forms_of_inputs_than_the_default_limit(
    compile_counter: CompileCounterWithBackend,
):
    queries, keys = unit(4, 16), unit(50, 16, seed=1)
    for num_excluded in range(1, torch._dynamo.config.recompile_limit + 2):
        exclude = torch.arange(4 * num_excluded).view(4, -1)
        inputs = AttentionInputs(queries, keys, keys, 8.0, None, exclude)
        for actual, expected in zip(FLEX.run(inputs), reference_attention(inputs), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert compile_counter.frame_count > torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("num_rows", [1, 1000, 2600])
@pytest.mark.parametrize("with_bias_and_exclude", [False, True])
def test_flex_attention_supports_bias_and_excluded_keys(
    num_rows: int, with_bias_and_exclude: bool, monkeypatch: pytest.MonkeyPatch
):
    # The same function as on a GPU, but not compiled.
    monkeypatch.setattr(fused_attention, "_compiled_flex", lambda: fused_attention._flex_attention)
    queries, keys, values = unit(20, 16), unit(num_rows, 16, seed=1), unit(num_rows, 16, seed=2)
    bias = torch.linspace(-2, 2, num_rows) if with_bias_and_exclude else None
    exclude = torch.randint(-1, num_rows, (20, 2)) if with_bias_and_exclude and num_rows > 1 else None
    inputs = AttentionInputs(queries, keys, values, 8.0, bias, exclude)
    for actual, expected in zip(FLEX.run(inputs), reference_attention(inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def gpu_inputs(
    num_keys: int = 100,
    width: int = 64,
    offset: int = 0,
    values_width: int = 0,
    *,
    with_bias: bool = False,
    with_exclude: bool = False,
) -> AttentionInputs:
    """Inputs on a GPU that need none: they have a device and a shape but no values."""
    with FakeTensorMode():
        numbers = torch.empty(offset + num_keys * width, dtype=torch.bfloat16, device="cuda")
        keys = numbers[offset:].view(num_keys, width)
        queries = torch.empty(30, width, device="cuda")
        bias = torch.empty(num_keys, device="cuda") if with_bias else None
        exclude = torch.empty(30, 1, dtype=torch.int64, device="cuda") if with_exclude else None
        values = torch.empty(num_keys, values_width, device="cuda") if values_width else keys
        return AttentionInputs(queries, keys, values, 10.0, bias, exclude)


GPU_BACKENDS = ["cudnn", "flash", "flex"]


@pytest.mark.parametrize(
    ("arguments", "supported", "reason"),
    [
        ({}, GPU_BACKENDS, ""),
        ({"num_keys": 2}, GPU_BACKENDS, ""),
        ({"num_keys": 1}, ["flash", "flex"], "needs at least 2 keys"),
        ({"num_keys": 0}, [], "needs at least 2 keys"),
        ({"width": 136}, ["flash", "flex"], "needs a width from 8 to 128 in steps of 8"),
        ({"width": 8}, ["cudnn", "flash"], ""),
        ({"width": 60}, [], "needs a width from 8 to 128 in steps of 8"),
        ({"offset": 8}, GPU_BACKENDS, ""),
        ({"offset": 4}, [], "needs rows aligned to 16 bytes"),
        ({"with_bias": True}, ["flex"], "does not support a bias"),
        ({"with_exclude": True}, ["flex"], "does not support excluded keys"),
        ({"values_width": 32}, [], "needs values as wide as the keys"),
    ],
    ids=str,
)
def test_gpu_backends_are_used_for_supported_inputs_only(arguments: dict, supported: list[str], reason: str):
    inputs = gpu_inputs(**arguments)
    assert [backend.name for backend in BACKENDS if backend.supports(inputs)] == [*supported, "tiles"]
    assert BACKENDS[0].unsupported_reason(inputs) == reason


@pytest.mark.parametrize(("num_keys", "supported"), [(5, ["flash-cpu", "tiles"]), (0, ["tiles"])])
def test_a_cpu_uses_cpu_backends(num_keys: int, supported: list[str]):
    inputs = AttentionInputs(unit(3, 8), unit(num_keys, 8), unit(num_keys, 8), 1.0)
    assert [backend.name for backend in BACKENDS if backend.supports(inputs)] == supported
    assert BACKENDS[0].unsupported_reason(inputs) == "needs cuda"


def test_the_fused_operator_is_selected_and_tiles_for_excluded_keys():
    rows = unit(40, 16)
    assert select_backend(AttentionInputs(rows, rows, rows, 1.0, torch.zeros(40))).name == "flash-cpu"
    exclude = torch.zeros(40, 1, dtype=torch.long)
    assert select_backend(AttentionInputs(rows, rows, rows, 1.0, None, exclude)).name == "tiles"


def test_the_log_reports_the_selected_backend_once(log_records: list[logging.LogRecord]):
    rows, bias = unit(40, 16), torch.zeros(40)
    for _ in range(3):
        select_backend(AttentionInputs(rows, rows, rows, 1.0, bias))
        select_backend(AttentionInputs(rows[:7], rows[:30], rows[:30], 5.0, bias[:30]))
    select_backend(AttentionInputs(rows, rows, rows, 1.0, None, torch.zeros(40, 1, dtype=torch.int64)))
    assert [record.getMessage() for record in log_records] == [
        "attention backend 'flash-cpu' selected for cpu, float32, width 16, bias",
        "attention backend 'tiles' selected for cpu, float32, width 16, 1 excluded; not used: "
        "flash-cpu (does not support excluded keys)",
    ]
    assert all(record.levelno == logging.INFO for record in log_records)


def test_backends_that_fail_their_self_test_are_logged_and_not_used(
    log_records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
):
    def not_a_number(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        lse, out = tiled_attention(inputs)
        return lse, out * torch.nan

    wrong = AttentionBackend("wrong", lambda inputs: tuple(2 * part for part in tiled_attention(inputs)), "cpu")  # type: ignore[arg-type]
    broken = AttentionBackend("broken", lambda inputs: inputs.no_such_operator, "cpu")  # type: ignore[attr-defined]
    undefined = AttentionBackend("undefined", not_a_number, "cpu")
    rows = unit(40, 16)
    monkeypatch.setattr(attention_backends, "BACKENDS", (wrong, broken, undefined, BACKENDS[-1]))
    for _ in range(3):
        assert select_backend(AttentionInputs(rows, rows, rows, 1.0)).name == "tiles"
    warnings = [record.getMessage() for record in log_records if record.levelno == logging.WARNING]
    assert len(warnings) == 3 and len(log_records) == 4
    prefix = "attention backend 'wrong' failed its self-test on cpu with width 16 and will not be used: lse error "
    assert warnings[0].startswith(prefix)
    assert "'broken' failed" in warnings[1]
    assert "AttributeError: 'AttentionInputs' object has no attribute 'no_such_operator'" in warnings[1]
    assert "output error nan" in warnings[2]
    selected = "attention backend 'tiles' selected for cpu, float32, width 16; not used: wrong (lse error "
    assert log_records[-1].getMessage().startswith(selected)
    monkeypatch.setattr(attention_backends, "BACKENDS", (wrong, broken, *BACKENDS))
    assert select_backend(AttentionInputs(rows, rows, rows, 1.0)).name == "flash-cpu"
