"""Threads that fit the size of the tables."""

import threading
from collections.abc import Iterator

import pytest
import torch

from distav.noise import threads
from distav.noise.threads import ELEMENTS_PER_THREAD, call_concurrently, threads_for


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(("elements", "expected"), [(10, 1), (3 * ELEMENTS_PER_THREAD, 3), (10**9, 4)])
def test_small_tables_use_few_threads(elements: int, expected: int):
    with threads_for(elements):
        assert torch.get_num_threads() == expected
    with pytest.raises(ZeroDivisionError), threads_for(elements):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 4


def call(num_functions: int, elements: int = 0) -> list[tuple[int, int, int]]:
    """Return number, thread and threads of OpenMP of each call."""
    functions = [
        lambda number=number: (number, threading.get_ident(), torch.get_num_threads())
        for number in range(num_functions)
    ]
    return call_concurrently(functions, torch.device("cpu"), elements)


def test_functions_on_small_tables_divide_the_threads():
    barrier = threading.Barrier(2)
    assert call_concurrently([lambda: barrier.wait(60)] * 2, torch.device("cpu")) in ([0, 1], [1, 0])
    results = call(3)
    assert [number for number, _, _ in results] == [0, 1, 2]
    assert all(ident != threading.get_ident() and number == 1 for _, ident, number in results)
    assert [number for _, _, number in call(2)] == [2, 2]


@pytest.mark.parametrize(("elements", "world_size"), [(4 * ELEMENTS_PER_THREAD, 1), (0, 2)])
def test_functions_on_large_tables_and_of_several_ranks_use_all_threads(
    elements: int, world_size: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(threads, "get_world_size", lambda: world_size)
    assert call(2, elements) == [(number, threading.get_ident(), 4) for number in range(2)]


def test_an_error_of_a_function_is_raised():
    with pytest.raises(ZeroDivisionError):
        call_concurrently([lambda: 1 // 0, lambda: 1], torch.device("cpu"))
