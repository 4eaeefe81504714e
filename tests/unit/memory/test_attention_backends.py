"""Which attention back end is chosen, what the log says of it, and how often FlexAttention is compiled."""

import functools
import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from distav.memory import attention_backends
from distav.memory.attention import AttentionInputs, reference_attention, tiled_attention
from distav.memory.attention_backends import BACKENDS, AttentionBackend, select_backend
from distav.memory.softmax import attend

FLEX = next(each for each in BACKENDS if each.name == "flex")


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """What the library's logger is told, with back ends tried and chosen as if for the first time."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    records: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("distav"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    attention_backends.self_test.cache_clear()
    attention_backends._log_selection.cache_clear()
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts what is compiled, for a CPU and without a compiler of C++."""
    counts = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    attention_backends._compiled_flex.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counts))
    yield counts
    attention_backends._compiled_flex.cache_clear()


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_flex_attention_is_compiled_once_for_all_temperatures(
    biased: bool, excluded: bool, counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention_backends, "_num_parts", lambda queries, num_keys: num_keys // 100)
    temperatures = [0.02 + 0.01 * each for each in range(14)]
    for number, temperature in enumerate([*temperatures, torch.tensor(0.5), torch.tensor(0.6)]):
        num_queries, num_keys = 20 + number % 3, 300 + 41 * number  # with rows left over, in 3 to 9 parts
        queries, keys, values = unit(num_queries, 16), unit(num_keys, 16, seed=1), unit(num_keys, 16, seed=2)
        bias = torch.linspace(-2, 2, num_keys) if biased else None
        exclude = torch.randint(-1, num_keys, (num_queries, 1)) if excluded else None
        if exclude is not None:
            exclude[0] = num_keys - 1  # among those left over
        asked = AttentionInputs(queries, keys, values, 1 / temperature, bias, exclude)
        for ours, expected in zip(FLEX.run(asked), reference_attention(asked), strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("back_end", ["flash-cpu", "tiles"])
def test_a_temperature_on_the_device_is_a_temperature(back_end: str):
    queries, keys = unit(20, 16), unit(2500, 16, seed=1)
    found = attend(queries, keys, keys, torch.tensor(0.07), backend=back_end)
    for ours, expected in zip(found, attend(queries, keys, keys, 0.07, backend=back_end), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def on_gpu(
    num_keys: int = 100,
    width: int = 64,
    offset: int = 0,
    values_width: int = 0,
    *,
    biased: bool = False,
    excluded: bool = False,
) -> AttentionInputs:
    """What could be asked of a GPU, without one."""
    with FakeTensorMode():
        numbers = torch.empty(offset + num_keys * width, dtype=torch.bfloat16, device="cuda")
        keys = numbers[offset:].view(num_keys, width)
        queries = torch.empty(30, width, device="cuda")
        bias = torch.empty(num_keys, device="cuda") if biased else None
        exclude = torch.empty(30, 1, dtype=torch.int64, device="cuda") if excluded else None
        values = torch.empty(num_keys, values_width, device="cuda") if values_width else keys
        return AttentionInputs(queries, keys, values, 10.0, bias, exclude)


GPU = ["cudnn", "flash", "flex"]


@pytest.mark.parametrize(
    ("asked", "able", "reason"),
    [
        ({}, GPU, ""),
        ({"num_keys": 2}, GPU, ""),
        ({"num_keys": 1}, ["flash", "flex"], "takes no fewer than 2 keys"),
        ({"num_keys": 0}, [], "takes no fewer than 2 keys"),
        ({"width": 136}, ["flash", "flex"], "takes widths from 8 to 128 in steps of 8"),
        ({"width": 8}, ["cudnn", "flash"], ""),
        ({"width": 60}, [], "takes widths from 8 to 128 in steps of 8"),
        ({"offset": 8}, GPU, ""),
        ({"offset": 4}, [], "takes only rows that begin at multiples of 16 bytes"),
        ({"biased": True}, ["flex"], "takes no bias"),
        ({"excluded": True}, ["flex"], "takes no excluded keys"),
        ({"values_width": 32}, [], "takes values only as wide as keys"),
    ],
    ids=str,
)
def test_back_ends_of_a_gpu_are_asked_only_for_what_they_can_do(asked: dict, able: list[str], reason: str):
    problem = on_gpu(**asked)
    assert [each.name for each in BACKENDS if each.supports(problem)] == [*able, "tiles"]
    assert BACKENDS[0].unsupported_reason(problem) == reason


@pytest.mark.parametrize(("num_keys", "able"), [(5, ["flash-cpu", "tiles"]), (0, ["tiles"])])
def test_a_cpu_has_its_own(num_keys: int, able: list[str]):
    problem = AttentionInputs(unit(3, 8), unit(num_keys, 8), unit(num_keys, 8), 1.0)
    assert [each.name for each in BACKENDS if each.supports(problem)] == able
    assert BACKENDS[0].unsupported_reason(problem) == "needs cuda"


def test_the_log_says_once_which_back_end_serves_and_why(said: list[logging.LogRecord]):
    rows, bias = unit(40, 16), torch.zeros(40)
    for _ in range(3):
        select_backend(AttentionInputs(rows, rows, rows, 1.0, bias))
        select_backend(AttentionInputs(rows[:7], rows[:30], rows[:30], 5.0, bias[:30]))
    select_backend(AttentionInputs(rows, rows, rows, 1.0, None, torch.zeros(40, 1, dtype=torch.int64)))
    assert [each.getMessage() for each in said] == [
        "attention (cpu, float32, width 16, bias): flash-cpu; cudnn needs cuda; flash needs cuda; flex needs cuda",
        "attention (cpu, float32, width 16, 1 excluded): tiles; cudnn needs cuda; flash needs cuda; flex needs cuda; "
        "flash-cpu takes no excluded keys",
    ]
    assert all(each.levelno == logging.INFO for each in said)


def test_the_log_warns_of_a_back_end_that_fails_its_probe(
    said: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
):
    def not_a_number(asked: AttentionInputs) -> tuple[Tensor, Tensor]:
        lse, out = tiled_attention(asked)
        return lse, out * torch.nan

    wrong = AttentionBackend("wrong", lambda asked: tuple(2 * each for each in tiled_attention(asked)), "cpu")  # type: ignore[arg-type]
    broken = AttentionBackend("broken", lambda asked: asked.no_such_operator, "cpu")  # type: ignore[attr-defined]
    monkeypatch.setattr(
        attention_backends,
        "BACK_ENDS",
        (wrong, broken, AttentionBackend("undefined", not_a_number, "cpu"), *attention_backends.BACKENDS[-1:]),
    )
    rows = unit(40, 16)
    for _ in range(3):
        assert select_backend(AttentionInputs(rows, rows, rows, 1.0)).name == "tiles"
    warnings = [each.getMessage() for each in said if each.levelno == logging.WARNING]
    assert len(warnings) == 3 and len(said) == 4
    assert "back end wrong failed its probe on cpu, width 16: lse off by" in warnings[0]
    assert "broken failed" in warnings[1] and "AttributeError: 'Asked' object has no attribute" in warnings[1]
    assert "average by nan" in warnings[2]
    assert said[-1].getMessage().startswith("attention (cpu, float32, width 16): tiles; wrong lse off by")
