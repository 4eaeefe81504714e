"""Whatever ends a run, the same command goes on to the very tensors of the run that nothing ended."""

import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from distav.distributed.signals import EXIT_INTERRUPTED as ASKED
from tests.helpers.launch import arguments, losses_by_step, records
from tests.helpers.team import Team, fingerprint, run_whole


@pytest.fixture(scope="module")
def unbroken(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run_whole(2, arguments(folder, tiny_shards), folder / "logs")
    return folder / "tiny"


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
def test_kills_at_random_moments_leave_no_trace(unbroken: Path, tiny_shards: Path, tmp_path: Path, kills: int):
    chance = random.Random(kills)
    done, runs, while_saving, began = 0, 0, 0, time.monotonic()
    while done < kills:
        folder = tmp_path / str(runs)
        while True:
            team = Team(2, arguments(folder, tiny_shards), folder / f"logs-{done}")
            victim = chance.choice([None, 0, 1])
            ends = time.monotonic() + chance.uniform(1.0, 8.0)
            while time.monotonic() < ends and any(each.is_alive() for each in team.ranks):
                time.sleep(0.005)
            if not any(each.is_alive() for each in team.ranks):
                assert team.end() == [0, 0], team.said()[-6000:]
                break
            team.signal(signal.SIGKILL, victim)
            statuses = team.end(60)
            assert None not in statuses and any(statuses), (statuses, team.said()[-6000:])
            while_saving += bool(list((folder / "tiny" / "checkpoints").glob(".writing-*")))
            done += 1
            if done == kills:
                run_whole(2, arguments(folder, tiny_shards), folder / "logs")
                break
        assert fingerprint(folder / "tiny") == fingerprint(unbroken)
        assert losses_by_step(folder / "tiny") == losses_by_step(unbroken)
        runs += 1
    print(f"{done} kills, {while_saving} of them in a save, {runs} runs, {time.monotonic() - began:.0f} s")


@pytest.mark.long
def test_a_run_goes_on_at_other_numbers_of_ranks(unbroken: Path, tiny_shards: Path, tmp_path: Path):
    """2, 1, 3 and 2 ranks in turn, asked to end in phase 1, in the correction and in the last phase."""
    given = arguments(tmp_path, tiny_shards)
    sought = (r"step 5/12 phase=contrastive", r"step 9/12 phase=contrastive", r"step 2/8 phase=hybrid")
    for number, (ranks, place) in enumerate(zip((2, 1, 3), sought, strict=True)):
        team = Team(ranks, given, tmp_path / f"logs-{number}")
        team.wait_for(lambda team=team, place=place: re.search(place, team.said()))
        team.signal(signal.SIGTERM, ranks - 1)
        assert team.end() == [ASKED] * ranks, team.said()[-6000:]
        assert "stop requested; checkpoint saved after step" in team.said()
    run_whole(2, given, tmp_path / "logs")
    alone, moved = losses_by_step(unbroken), losses_by_step(tmp_path / "tiny")
    assert moved.keys() == alone.keys() == set(range(1, 21))
    np.testing.assert_allclose([moved[step] for step in alone], list(alone.values()), rtol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_to_one_rank_saves_and_ends_all(unbroken: Path, tiny_shards: Path, tmp_path: Path, number: int):
    given = arguments(tmp_path, tiny_shards, "run.checkpoint_every=100")
    team = Team(2, given, tmp_path / "first")
    team.wait_for(lambda: "step 4/12 phase=contrastive" in team.said())
    team.signal(number, 1)
    team.signal(number, 1)  # The launcher says again what the scheduler has said.
    assert team.end() == [ASKED, ASKED], team.said()[-6000:]
    assert len(list((tmp_path / "tiny" / "checkpoints").glob("step-*"))) == 1
    run_whole(2, given, tmp_path / "second")
    assert fingerprint(tmp_path / "tiny") == fingerprint(unbroken)


@pytest.mark.long
def test_features_that_were_extracted_are_not_extracted_again(unbroken: Path, tiny_shards: Path, tmp_path: Path):
    given = arguments(tmp_path, tiny_shards)
    team = Team(2, given, tmp_path / "first")
    half = tmp_path / "tiny" / "checkpoints"
    team.wait_for(lambda: any(not each.name.endswith("-000000") for each in half.glob("step-000000012-001-*")))
    team.signal(signal.SIGKILL)
    team.end()
    where = sorted(each.name for each in half.glob("step-*"))[-1]
    assert where.startswith("step-000000012-001-")
    again = run_whole(2, given, tmp_path / "second")
    assert "resuming in phase correction" in again.said()
    saved = [each for each in records(tmp_path / "tiny") if "time/checkpoint_s" in each]
    assert saved and fingerprint(tmp_path / "tiny") == fingerprint(unbroken)
