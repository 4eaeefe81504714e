"""Tasks that processes share by leases: each is done once, and those of killed processes are taken over."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.data.preparation.shared_work import Part, SharedWork

TASKS = [f"task-{number}" for number in range(40)]


def share(folder: Path, tasks: list[str] = TASKS, lease_s: float = 1.0) -> SharedWork:
    return SharedWork(folder, tasks, lambda task: (folder / task).exists(), leased=True, lease_s=lease_s)


def do_all(folder: Path) -> None:
    """Do tasks until all are done; each leaves a file per process that did it."""
    with share(folder) as work:
        while not work.finished():
            if (task := work.next()) is None:
                time.sleep(0.01)
                continue
            (folder / f"{task}-by-{os.getpid()}").touch()
            time.sleep(0.005)
            (folder / task).touch()
            work.release(task)


def claim_and_hang(folder: Path) -> None:
    with share(folder, TASKS[:1]) as work:
        assert work.next() == TASKS[0]
        (folder / "claimed").touch()
        time.sleep(60)


def test_processes_do_each_task_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=do_all, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("task-*-by-*"))) == len(TASKS)
    assert not list(tmp_path.glob("*.lease"))


def test_tasks_of_a_killed_process_are_taken_over_and_those_of_a_slow_one_are_not(tmp_path: Path):
    process = multiprocessing.get_context("fork").Process(target=claim_and_hang, args=(tmp_path,))
    process.start()
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    with share(tmp_path, TASKS[:1]) as work:
        time.sleep(1.6)
        assert work.next() is None, "its lease is renewed"
        os.kill(process.pid, signal.SIGKILL)  # pyright: ignore[reportArgumentType]
        process.join()
        deadline = time.monotonic() + 10
        while (task := work.next()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert task == TASKS[0]
    assert not list(tmp_path.glob("*.lease"))


def test_a_task_that_is_given_back_can_be_claimed_again(tmp_path: Path):
    for leased in (True, False):
        with SharedWork(tmp_path, ["a", "b"], lambda task: False, leased=leased) as work:
            assert [work.next(), work.next(), work.next()] == ["a", "b", None]
            work.release("a")
            assert work.next() == "a" and not work.finished()


def test_parts():
    assert Part.parse("any") == Part(leased=True) and Part.parse("2/3") == Part(2, 3)
    assert list(Part(1, 3).indices(8)) == [1, 4, 7]
    with pytest.raises(UserError, match="or any"):
        Part.parse("all")
