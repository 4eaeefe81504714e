"""Diagnoses of the watchdog where ranks begin collectives and wait for them elsewhere, as with NCCL."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from distav.distributed.collectives import get_rank
from distav.distributed.watchdog import EXIT_WATCHDOG, Watchdog
from tests.helpers.rank_group import CpuProcess
from tests.helpers.spawn import on_ranks

TIMEOUT_S = 2.0


class RecordingWatchdog(Watchdog):
    """A watchdog that keeps its diagnosis instead of ending the process."""

    diagnosis = ""

    def _abort(self, diagnosis: str) -> None:
        self.diagnosis = diagnosis
        self._done.set()

    def wait(self) -> str:
        """Return the diagnosis; empty if there is none within twice the timeout."""
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < deadline and not self.diagnosis:
            time.sleep(0.05)
        return self.diagnosis


@contextlib.contextmanager
def running_watchdog() -> Iterator[RecordingWatchdog]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if get_rank() == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port)
    watchdog = RecordingWatchdog("127.0.0.1", port[0], get_rank(), 2, TIMEOUT_S)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
        dist.barrier()


def behind() -> str:
    with running_watchdog() as watchdog:
        work: Any = None
        if get_rank() == 0:
            watchdog.record_collective("all_reduce sum")
            work = dist.all_reduce(torch.ones(1), async_op=True)
        diagnosis = watchdog.wait()
        work = work or dist.all_reduce(torch.ones(1), async_op=True)
        work.wait()
    return diagnosis


def behind_in_another_group() -> str:
    """Collectives of DeepSpeed, which distav does not record."""
    with running_watchdog() as watchdog:
        group: Any = dist.new_group([0, 1])
        dist.all_reduce(torch.ones(1), group=group)
        work: Any = dist.all_reduce(torch.ones(1), group=group, async_op=True) if get_rank() == 0 else None
        diagnosis = watchdog.wait()
        work = work or dist.all_reduce(torch.ones(1), group=group, async_op=True)
        work.wait()
    return diagnosis


@pytest.mark.parametrize("scenario", [behind, behind_in_another_group])
def test_the_rank_with_fewer_collectives_is_named(scenario: Callable[[], str]):
    for diagnosis in on_ranks(2, scenario):
        assert diagnosis.startswith("rank 1 (") and "; start, last collective none)" in diagnosis, diagnosis
        assert "has made no progress for" in diagnosis and "rank 0" not in diagnosis


def no_rank_behind() -> str:
    with running_watchdog() as watchdog:
        group: Any = dist.new_group([0, 1], timeout=timedelta(seconds=4 * TIMEOUT_S))
        work: Any = dist.broadcast(
            torch.ones(1), src=1 - get_rank(), group=group, async_op=True
        )  # Each waits for the other.
        diagnosis = watchdog.wait()
        with pytest.raises(RuntimeError):
            work.wait()
    return diagnosis


def test_no_rank_is_named_if_all_are_in_the_same_collective():
    for diagnosis in on_ranks(2, no_rank_behind):
        assert diagnosis.startswith("all ranks began collective 1 ") and "none has finished it for" in diagnosis


def computing_without_collectives() -> str:
    with running_watchdog() as watchdog:
        dist.all_reduce(torch.ones(1))
        return watchdog.wait()


def ahead_but_not_waiting() -> str:
    """A rank that did not have to wait in its last collective."""
    with running_watchdog() as watchdog:
        if get_rank() == 0:
            watchdog.record_collective("broadcast")
        return watchdog.wait()


@pytest.mark.parametrize("scenario", [computing_without_collectives, ahead_but_not_waiting])
def test_ranks_that_do_not_wait_have_no_time_limit(scenario: Callable[[], str]):
    assert on_ranks(2, scenario) == ["", ""]


def fail_while_aborting() -> None:
    """A rank whose collective fails because another rank has ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watchdog = Watchdog("127.0.0.1", store.port, 0, 2, 0.5)
    began = threading.Event()
    watchdog._write_records = lambda: began.set() or time.sleep(2)
    watchdog.start()
    began.wait()
    watchdog.stop()
    sys.exit(1)


def test_an_aborting_rank_exits_with_the_watchdog_status():
    process = CpuProcess(target=fail_while_aborting)
    process.start()
    process.join(60)
    assert process.exitcode == EXIT_WATCHDOG
