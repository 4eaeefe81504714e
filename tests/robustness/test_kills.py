"""After any interruption, the same command continues to the same tensors as an uninterrupted run."""

import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from distav.distributed.signals import EXIT_INTERRUPTED
from tests.helpers.launch import arguments, losses_by_step, read_metrics
from tests.helpers.rank_group import RankGroup, fingerprint, run_to_completion


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_to_completion(2, arguments(folder, tiny_shards), folder / "logs")
    return folder / "tiny"


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
def test_kills_at_random_times_change_nothing(uninterrupted: Path, tiny_shards: Path, tmp_path: Path, kills: int):
    rng = random.Random(kills)
    num_killed, num_runs, while_saving, began = 0, 0, 0, time.monotonic()
    while num_killed < kills:
        folder = tmp_path / str(num_runs)
        while True:
            group = RankGroup(2, arguments(folder, tiny_shards), folder / f"logs-{num_killed}")
            victim = rng.choice([None, 0, 1])
            ends = time.monotonic() + rng.uniform(1.0, 8.0)
            while time.monotonic() < ends and any(process.is_alive() for process in group.processes):
                time.sleep(0.005)
            if not any(process.is_alive() for process in group.processes):
                assert group.wait() == [0, 0], group.output()[-6000:]
                break
            group.signal(signal.SIGKILL, victim)
            statuses = group.wait(60)
            assert None not in statuses and any(statuses), (statuses, group.output()[-6000:])
            while_saving += bool(list((folder / "tiny" / "checkpoints").glob(".writing-*")))
            num_killed += 1
            if num_killed == kills:
                run_to_completion(2, arguments(folder, tiny_shards), folder / "logs")
                break
        assert fingerprint(folder / "tiny") == fingerprint(uninterrupted)
        assert losses_by_step(folder / "tiny") == losses_by_step(uninterrupted)
        num_runs += 1
    print(
        f"{num_killed} kills, {while_saving} of them during a save, {num_runs} runs, {time.monotonic() - began:.0f} s"
    )


@pytest.mark.long
def test_a_run_continues_with_other_numbers_of_ranks(uninterrupted: Path, tiny_shards: Path, tmp_path: Path):
    """Run with 2, 1, 3 and 2 ranks, interrupted twice in the contrastive phase and once in the last phase."""
    command_line = arguments(tmp_path, tiny_shards)
    patterns = (r"step 5/12 phase=contrastive", r"step 9/12 phase=contrastive", r"step 2/8 phase=hybrid")
    for number, (ranks, pattern) in enumerate(zip((2, 1, 3), patterns, strict=True)):
        group = RankGroup(ranks, command_line, tmp_path / f"logs-{number}")
        group.wait_for(lambda group=group, pattern=pattern: re.search(pattern, group.output()))
        group.signal(signal.SIGTERM, ranks - 1)
        assert group.wait() == [EXIT_INTERRUPTED] * ranks, group.output()[-6000:]
        assert "stop requested; checkpoint saved after step" in group.output()
    run_to_completion(2, command_line, tmp_path / "logs")
    expected, moved = losses_by_step(uninterrupted), losses_by_step(tmp_path / "tiny")
    assert moved.keys() == expected.keys() == set(range(1, 21))
    np.testing.assert_allclose([moved[step] for step in expected], list(expected.values()), rtol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_to_one_rank_saves_and_ends_all_ranks(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path, number: int
):
    command_line = arguments(tmp_path, tiny_shards, "run.checkpoint_every=100")
    group = RankGroup(2, command_line, tmp_path / "first")
    group.wait_for(lambda: "step 4/12 phase=contrastive" in group.output())
    group.signal(number, 1)
    group.signal(number, 1)  # The launcher forwards the signal that the scheduler has sent to the ranks too.
    assert group.wait() == [EXIT_INTERRUPTED, EXIT_INTERRUPTED], group.output()[-6000:]
    assert len(list((tmp_path / "tiny" / "checkpoints").glob("step-*"))) == 1
    run_to_completion(2, command_line, tmp_path / "second")
    assert fingerprint(tmp_path / "tiny") == fingerprint(uninterrupted)


@pytest.mark.long
def test_extracted_features_are_not_extracted_again(uninterrupted: Path, tiny_shards: Path, tmp_path: Path):
    command_line = arguments(tmp_path, tiny_shards)
    group = RankGroup(2, command_line, tmp_path / "first")
    checkpoints = tmp_path / "tiny" / "checkpoints"
    group.wait_for(lambda: any(not path.name.endswith("-000000") for path in checkpoints.glob("step-000000012-001-*")))
    group.signal(signal.SIGKILL)
    group.wait()
    newest = sorted(path.name for path in checkpoints.glob("step-*"))[-1]
    assert newest.startswith("step-000000012-001-")
    resumed = run_to_completion(2, command_line, tmp_path / "second")
    assert "resuming in phase correction" in resumed.output()
    saved = [record for record in read_metrics(tmp_path / "tiny") if "time/checkpoint_s" in record]
    assert saved and fingerprint(tmp_path / "tiny") == fingerprint(uninterrupted)
