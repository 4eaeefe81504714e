"""A rank that stops, dies or fails is named, all ranks exit, and the same command resumes."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.flight_recorder.components.loader import read_dump

from distav.distributed.signals import EXIT_INTERRUPTED
from distav.distributed.watchdog import EXIT_WATCHDOG
from tests.helpers.launch import arguments, command, environment
from tests.helpers.rank_group import RankGroup, run_to_completion

TIMEOUT_S = 6


def begun(group: RankGroup) -> bool:
    return "step 3/12 phase=contrastive" in group.output()


@pytest.mark.long  # test_a_rank_without_progress_is_named and test_a_killed_rank_is_named_by_the_others remain.
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_within_the_timeout(tiny_shards: Path, tmp_path: Path, stopped: int):
    command_line = arguments(tmp_path, tiny_shards)
    group = RankGroup(3, command_line, tmp_path / "first")
    group.wait_for(lambda: begun(group))
    group.signal(signal.SIGSTOP, stopped)
    began = time.monotonic()
    for rank, process in enumerate(group.processes):
        if rank != stopped:
            process.join(4 * TIMEOUT_S)
    waited = time.monotonic() - began
    statuses = [process.exitcode for rank, process in enumerate(group.processes) if rank != stopped]
    assert statuses == [EXIT_WATCHDOG, EXIT_WATCHDOG], (statuses, group.output()[-6000:])
    assert waited < 2 * TIMEOUT_S + 2
    for rank, log in enumerate(group.logs):
        if rank != stopped:
            output = log.read_text()
            assert re.search(
                rf"distav: rank {rank}: watchdog timeout: no (heartbeat|answer) from rank {stopped} for", output
            ), output
            assert 'File "' in output and "Thread 0x" in output
    group.signal(signal.SIGCONT, stopped)
    group.wait(10)
    run_to_completion(3, command_line, tmp_path / "second")


def _at_step_3(rank: int, action: Callable[[], None]) -> None:
    """Run an action on rank 1 before its third step."""
    if rank == 1:
        from distav.training.engine.deepspeed_engine import Engine

        plain, calls = Engine.step, [0]

        def step(self: Engine) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                action()
            return plain(self)

        Engine.step = step


def _fail() -> None:
    raise ZeroDivisionError("a failure of this rank")


def _fail_at_step_3(rank: int) -> None:
    _at_step_3(rank, _fail)


def _sleep_at_step_3(rank: int) -> None:
    _at_step_3(rank, lambda: time.sleep(60))


@pytest.mark.long
def test_all_ranks_report_the_failure_of_one(tiny_shards: Path, tmp_path: Path):
    command_line = arguments(tmp_path, tiny_shards)
    group = RankGroup(2, command_line, tmp_path / "first", _fail_at_step_3)
    statuses = group.wait(40)
    assert all(statuses), (statuses, group.output()[-6000:])
    assert "rank 1 failed on" in group.logs[0].read_text() and "a failure of this rank" in group.logs[0].read_text()
    assert "ZeroDivisionError: a failure of this rank" in group.logs[1].read_text()
    run_to_completion(2, command_line, tmp_path / "second")


def _sleep_and_hide_waits(rank: int) -> None:
    """Imitate NCCL, where a waiting rank is in no call of torch.distributed."""
    from distav.distributed import watchdog

    watchdog._waits_in_python = lambda: False
    _sleep_at_step_3(rank)


@pytest.mark.parametrize("before", [pytest.param(_sleep_at_step_3, marks=pytest.mark.long), _sleep_and_hide_waits])
def test_a_rank_without_progress_is_named(tiny_shards: Path, tmp_path: Path, before: Callable[[int], None]):
    group = RankGroup(2, arguments(tmp_path, tiny_shards), tmp_path / "first", before)
    statuses = group.wait(60)
    assert statuses == [EXIT_WATCHDOG, EXIT_WATCHDOG], (statuses, group.output()[-6000:])
    for log in group.logs:
        assert re.search(
            r"watchdog timeout: rank 1 \(.*; contrastive step 3, .*\) has made no progress", log.read_text()
        )
    records = tmp_path / "tiny" / "logs" / "collectives" / "gloo"
    dumps: list[Any] = [read_dump("rank_", str(records / f"rank_{rank}"))["entries"] for rank in range(2)]
    ended, others = ([entry["retired"] for entry in entries] for entries in dumps)
    assert not ended[-1] and all(ended[:-1]) and all(others)


def test_a_killed_rank_is_named_by_the_others(tiny_shards: Path, tmp_path: Path):
    group = RankGroup(3, arguments(tmp_path, tiny_shards), tmp_path / "first")
    group.wait_for(lambda: begun(group))
    group.signal(signal.SIGKILL, 2)
    statuses = group.wait(40)
    assert all(statuses), (statuses, group.output()[-6000:])
    assert re.search(r"distav: rank 0: .*no heartbeat from rank 2 for", group.logs[0].read_text())


def launched(command_line: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start two ranks with the launcher and wait until they train."""
    with open(log, "w") as file:
        words = command(Path(command_line[1]), *command_line[2:], ranks=2)
        process = subprocess.Popen(words, env=environment(), stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while "step 3/12 phase=contrastive" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    return process


@pytest.mark.long  # test_kills sends signals to ranks without a launcher.
@pytest.mark.parametrize("who", ["ranks", "all", "launcher killed"])
def test_the_launcher_forwards_signals_and_the_exit_status(tiny_shards: Path, tmp_path: Path, who: str):
    command_line, log = arguments(tmp_path, tiny_shards), tmp_path / "output.txt"
    process = launched(command_line, log)
    if who == "all":  # Some schedulers do this; the launcher then signals the ranks again.
        os.killpg(process.pid, signal.SIGTERM)
    elif who == "ranks":
        subprocess.run(["pkill", "-USR1", "-f", f"train.py --local_rank.*{command_line[1]}"], check=True)
    else:
        subprocess.run(["pkill", "-KILL", "-f", f"deepspeed.launcher.launch.*{command_line[1]}"], check=True)
    process.wait(60)
    deadline = time.monotonic() + 30
    while "stop requested; checkpoint saved" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "stop requested; checkpoint saved after step" in log.read_text(), log.read_text()[-3000:]
    if who != "launcher killed":  # `deepspeed` then returns 0 in any case.
        assert process.returncode == EXIT_INTERRUPTED if who == "ranks" else process.returncode != 0
    assert not list((tmp_path / "tiny" / "checkpoints").glob(".writing-*"))


@pytest.mark.long
def test_two_runs_do_not_share_a_directory(tiny_shards: Path, tmp_path: Path):
    command_line = arguments(tmp_path, tiny_shards)
    first = RankGroup(1, command_line, tmp_path / "first")
    first.wait_for(lambda: begun(first))
    first.signal(signal.SIGSTOP)
    second = RankGroup(1, command_line, tmp_path / "second")
    assert second.wait(60) == [1]
    assert (
        f"process {first.processes[0].pid} on" in second.output() and "is training in this directory" in second.output()
    )
    first.signal(signal.SIGCONT)
    assert first.wait() == [0], first.output()[-3000:]


def test_ranks_of_one_machine_listen_on_loopback_only(tiny_shards: Path, tmp_path: Path):
    group = RankGroup(2, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    group.wait_for(lambda: begun(group))
    group.signal(signal.SIGSTOP)
    addresses = [
        connection.laddr.ip
        for process in group.processes
        for connection in psutil.Process(process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert addresses and set(addresses) <= {"127.0.0.1", "::1"}
