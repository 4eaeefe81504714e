"""Whom the watch names where ranks begin collectives and wait for them elsewhere, as they do under NCCL."""

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
from tests.helpers.spawn import on_ranks
from tests.helpers.team import new_process

TIMEOUT_S = 2.0


class Told(Watchdog):
    """A watch that keeps its verdict in place of ending the process."""

    verdict = ""

    def _give_up(self, verdict: str) -> None:
        self.verdict = verdict
        self._done.set()

    def wait(self) -> str:
        """Return the verdict; empty where there is none in twice the timeout."""
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < deadline and not self.verdict:
            time.sleep(0.05)
        return self.verdict


@contextlib.contextmanager
def watching() -> Iterator[Told]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if get_rank() == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port)
    watch = Told("127.0.0.1", port[0], get_rank(), 2, TIMEOUT_S)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        dist.barrier()


def behind() -> str:
    with watching() as watch:
        work: Any = None
        if get_rank() == 0:
            watch.mark("adding up")
            work = dist.all_reduce(torch.ones(1), async_op=True)
        told = watch.wait()
        work = work or dist.all_reduce(torch.ones(1), async_op=True)
        work.wait()
    return told


def behind_in_another_group() -> str:
    """As a rank of DeepSpeed's, whose collectives are not marked."""
    with watching() as watch:
        group: Any = dist.new_group([0, 1])
        dist.all_reduce(torch.ones(1), group=group)
        work: Any = dist.all_reduce(torch.ones(1), group=group, async_op=True) if get_rank() == 0 else None
        told = watch.wait()
        work = work or dist.all_reduce(torch.ones(1), group=group, async_op=True)
        work.wait()
    return told


@pytest.mark.parametrize("scenario", [behind, behind_in_another_group])
def test_the_rank_that_has_begun_fewer_collectives_is_named(scenario: Callable[[], str]):
    for told in on_ranks(2, scenario):
        assert told.startswith("rank 1 (in start, last collective nothing on "), told
        assert "keeps the others waiting for" in told and "rank 0" not in told


def nobody_behind() -> str:
    with watching() as watch:
        group: Any = dist.new_group([0, 1], timeout=timedelta(seconds=4 * TIMEOUT_S))
        work: Any = dist.broadcast(
            torch.ones(1), src=1 - get_rank(), group=group, async_op=True
        )  # Each waits for the other.
        told = watch.wait()
        with pytest.raises(RuntimeError):
            work.wait()
    return told


def test_no_rank_is_named_where_all_are_in_the_same_collective():
    for told in on_ranks(2, nobody_behind):
        assert told.startswith("all ranks began collective 1 ") and "none has finished it for" in told


def alone() -> str:
    with watching() as watch:
        dist.all_reduce(torch.ones(1))
        return watch.wait()


def ahead_but_not_waiting() -> str:
    """As a rank that had nothing to wait for in its last collective."""
    with watching() as watch:
        if get_rank() == 0:
            watch.mark("telling all ranks")
        return watch.wait()


@pytest.mark.parametrize("scenario", [alone, ahead_but_not_waiting])
def test_ranks_that_do_not_wait_may_work_for_as_long_as_they_like(scenario: Callable[[], str]):
    assert on_ranks(2, scenario) == ["", ""]


def fail_while_giving_up() -> None:
    """As a rank whose collective breaks off when another one has ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = Watchdog("127.0.0.1", store.port, 0, 2, 0.5)
    began = threading.Event()
    watch._write_records = lambda: began.set() or time.sleep(2)
    watch.start()
    began.wait()
    watch.stop()
    sys.exit(1)


def test_a_rank_that_gives_up_ends_with_that_status():
    process = new_process(fail_while_giving_up)
    process.start()
    process.join(60)
    assert process.exitcode == EXIT_WATCHDOG
