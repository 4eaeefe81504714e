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
from tests.helpers.team import Team, run_whole

TIMEOUT_S = 6


def begun(team: Team) -> bool:
    return "step 3/12 phase=contrastive" in team.said()


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_stopped_rank_is_named_within_the_timeout(tiny_shards: Path, tmp_path: Path, stopped: int):
    given = arguments(tmp_path, tiny_shards)
    team = Team(3, given, tmp_path / "first")
    team.wait_for(lambda: begun(team))
    team.signal(signal.SIGSTOP, stopped)
    began = time.monotonic()
    for rank, each in enumerate(team.ranks):
        if rank != stopped:
            each.join(4 * TIMEOUT_S)
    waited = time.monotonic() - began
    statuses = [each.exitcode for rank, each in enumerate(team.ranks) if rank != stopped]
    assert statuses == [EXIT_WATCHDOG, EXIT_WATCHDOG], (statuses, team.said()[-6000:])
    assert waited < 2 * TIMEOUT_S + 2
    for rank, log in enumerate(team.logs):
        if rank != stopped:
            said = log.read_text()
            assert re.search(
                rf"distav: rank {rank}: watchdog timeout: no (heartbeat|answer) from rank {stopped} for", said
            ), said
            assert 'File "' in said and "Thread 0x" in said
    team.signal(signal.SIGCONT, stopped)
    team.end(10)
    run_whole(3, given, tmp_path / "second")


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
    given = arguments(tmp_path, tiny_shards)
    team = Team(2, given, tmp_path / "first", _fail_at_step_3)
    statuses = team.end(40)
    assert all(statuses), (statuses, team.said()[-6000:])
    assert "rank 1 failed on" in team.logs[0].read_text() and "a failure of this rank" in team.logs[0].read_text()
    assert "ZeroDivisionError: a failure of this rank" in team.logs[1].read_text()
    run_whole(2, given, tmp_path / "second")


def _sleep_and_hide_waits(rank: int) -> None:
    """Imitate NCCL, where a waiting rank is in no call of torch.distributed."""
    from distav.distributed import watchdog

    watchdog._waits_in_python = lambda: False
    _sleep_at_step_3(rank)


@pytest.mark.parametrize("before", [pytest.param(_sleep_at_step_3, marks=pytest.mark.long), _sleep_and_hide_waits])
def test_a_rank_without_progress_is_named(tiny_shards: Path, tmp_path: Path, before: Callable[[int], None]):
    team = Team(2, arguments(tmp_path, tiny_shards), tmp_path / "first", before)
    statuses = team.end(60)
    assert statuses == [EXIT_WATCHDOG, EXIT_WATCHDOG], (statuses, team.said()[-6000:])
    for log in team.logs:
        assert re.search(
            r"watchdog timeout: rank 1 \(.*; contrastive step 3, .*\) has made no progress", log.read_text()
        )
    records = tmp_path / "tiny" / "logs" / "collectives" / "gloo"
    dumps: list[Any] = [read_dump("rank_", str(records / f"rank_{rank}"))["entries"] for rank in range(2)]
    ended, others = ([each["retired"] for each in entries] for entries in dumps)
    assert not ended[-1] and all(ended[:-1]) and all(others)


def test_a_killed_rank_is_named_by_the_others(tiny_shards: Path, tmp_path: Path):
    team = Team(3, arguments(tmp_path, tiny_shards), tmp_path / "first")
    team.wait_for(lambda: begun(team))
    team.signal(signal.SIGKILL, 2)
    statuses = team.end(40)
    assert all(statuses), (statuses, team.said()[-6000:])
    assert re.search(r"distav: rank 0: .*no heartbeat from rank 2 for", team.logs[0].read_text())


def launched(given: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start two ranks with the launcher and wait until they train."""
    with open(log, "w") as file:
        words = command(Path(given[1]), *given[2:], ranks=2)
        process = subprocess.Popen(words, env=environment(), stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while "step 3/12 phase=contrastive" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    return process


@pytest.mark.long  # test_kills sends signals to ranks without a launcher.
@pytest.mark.parametrize("who", ["ranks", "all", "launcher killed"])
def test_the_launcher_forwards_signals_and_the_exit_status(tiny_shards: Path, tmp_path: Path, who: str):
    given, log = arguments(tmp_path, tiny_shards), tmp_path / "said.txt"
    process = launched(given, log)
    if who == "all":  # Some schedulers do this; the launcher then signals the ranks again.
        os.killpg(process.pid, signal.SIGTERM)
    elif who == "ranks":
        subprocess.run(["pkill", "-USR1", "-f", f"train.py --local_rank.*{given[1]}"], check=True)
    else:
        subprocess.run(["pkill", "-KILL", "-f", f"deepspeed.launcher.launch.*{given[1]}"], check=True)
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
    given = arguments(tmp_path, tiny_shards)
    first = Team(1, given, tmp_path / "first")
    first.wait_for(lambda: begun(first))
    first.signal(signal.SIGSTOP)
    second = Team(1, given, tmp_path / "second")
    assert second.end(60) == [1]
    assert f"process {first.ranks[0].pid} on" in second.said() and "is training in this directory" in second.said()
    first.signal(signal.SIGCONT)
    assert first.end() == [0], first.said()[-3000:]


def test_ranks_of_one_machine_listen_on_loopback_only(tiny_shards: Path, tmp_path: Path):
    team = Team(2, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    team.wait_for(lambda: begun(team))
    team.signal(signal.SIGSTOP)
    addresses = [
        each.laddr.ip
        for rank in team.ranks
        for each in psutil.Process(rank.pid).net_connections(kind="inet")
        if each.status == psutil.CONN_LISTEN
    ]
    assert addresses and set(addresses) <= {"127.0.0.1", "::1"}
