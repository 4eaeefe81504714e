"""Number of threads of a rank while it trains."""

import pytest
import torch

from distav.distributed.process_group import core_for_loading


@pytest.mark.parametrize(("needed", "threads", "expected"), [(True, 4, 3), (True, 1, 1), (False, 4, 4)])
def test_a_core_is_left_to_the_loader_if_it_needs_one(needed: bool, threads: int, expected: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ZeroDivisionError), core_for_loading(needed):
            assert torch.get_num_threads() == expected
            raise ZeroDivisionError
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
