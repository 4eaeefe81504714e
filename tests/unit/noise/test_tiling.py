"""Threads that fit the size of the tables."""

import pytest
import torch

from distav.noise.tiling import ELEMENTS_PER_THREAD, threads_for


@pytest.mark.parametrize(("elements", "expected"), [(10, 1), (3 * ELEMENTS_PER_THREAD, 3), (10**9, 4)])
def test_small_tables_use_few_threads(elements: int, expected: int):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with threads_for(elements):
            assert torch.get_num_threads() == expected
        with pytest.raises(ZeroDivisionError), threads_for(elements):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
