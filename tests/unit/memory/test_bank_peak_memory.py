"""Peak memory of building and refreshing a memory bank."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distav.memory.bank import Bank

CPU = torch.device("cpu")
TILE_BYTES = 64 * 2**20


def memory_bytes(name: str) -> int:
    """Memory use of this process as reported by the kernel, such as `VmRSS` or its peak `VmHWM`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the peak memory during the call exceeds the memory before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_bytes("VmRSS")
    work()
    return memory_bytes("VmHWM") - before


def bank_growths(num_samples: int) -> tuple[int, dict[str, int]]:
    """Size of a bank, and the peak growth of building it and of each operation on all rows."""
    torch.set_num_threads(1)
    Bank(4096, 128, 0.5, CPU).state()  # allocates what the libraries keep
    banks: list[Bank] = []
    growths = {"build": peak_growth(lambda: banks.append(Bank(num_samples, 128, 0.5, CPU, dtype=torch.bfloat16)))}
    bank = banks[0]
    size = sum(column.nbytes for column in [*bank.columns.values(), bank.keys("visual"), bank.keys("audio")])
    state = bank.state()
    growths["reinitialize"] = peak_growth(bank.reinitialize)
    growths["refresh"] = peak_growth(bank.refresh)
    growths["restore"] = peak_growth(lambda: bank.restore([state]))
    return size, growths


@pytest.mark.parametrize("num_samples", [100_000, pytest.param(2_000_000, marks=pytest.mark.long)])
def test_a_bank_takes_little_more_memory_than_its_rows(num_samples: int):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size, growths = pool.apply(bank_growths, (num_samples,))
    assert growths.pop("build") <= 1.3 * size + TILE_BYTES
    assert all(growth <= TILE_BYTES for growth in growths.values()), growths
