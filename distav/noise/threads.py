"""Threads that fit the size of the tables: many small operations gain more from concurrent calls than from OpenMP."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from distav.distributed.collectives import get_world_size

ELEMENTS_PER_THREAD = 2**19
"""Elements for which another thread of a CPU saves more time than the threads take to wait for one another."""

T = TypeVar("T")


@contextlib.contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Context in which operations on tables of a size use the threads that they gain from, at most the present ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, elements // ELEMENTS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def call_concurrently(functions: Sequence[Callable[[], T]], device: torch.device, elements: int = 0) -> list[T]:
    """Call functions and return their results in order; at the same time if their operations leave CPU threads unused.

    Several ranks call them one after the other, because all of them must call collectives in the same order.

    Args:
        functions: the functions.
        device: device of their tables.
        elements: size of the tables that a single operation processes.
    """
    threads = torch.get_num_threads()
    workers = min(len(functions), threads // max(1, elements // ELEMENTS_PER_THREAD))
    if workers < 2 or device.type != "cpu" or get_world_size() > 1:
        return [function() for function in functions]
    try:
        # The number of threads of OpenMP is one of each calling thread.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            return list(pool.map(lambda function: function(), functions))
    finally:
        torch.set_num_threads(threads)
