"""A checkpoint is whole, or it is recognised and passed over; a save that fails costs nothing but itself."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distav.data.integrity import MANIFEST
from tests.helpers.launch import arguments, records
from tests.helpers.team import Team, fingerprint, last_checkpoint, run_whole


@pytest.fixture(scope="module")
def halfway(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with two whole checkpoints of phase 1."""
    folder = tmp_path_factory.mktemp("halfway")
    team = Team(2, arguments(folder, tiny_shards), folder / "logs")
    team.wait_for(lambda: "step 6/12 phase=contrastive" in team.said())
    team.signal(signal.SIGTERM, 0)
    team.end()
    return folder


@pytest.fixture(scope="module")
def undamaged(halfway: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, gone on to its end."""
    folder = tmp_path_factory.mktemp("undamaged")
    copied(halfway, folder)
    run_whole(2, arguments(folder, tiny_shards), folder / "logs")
    return folder / "tiny"


def copied(halfway: Path, tmp_path: Path) -> Path:
    shutil.copytree(halfway / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny" / "checkpoints"


def test_a_checkpoint_has_a_seal_and_nothing_that_runs(halfway: Path):
    where = last_checkpoint(halfway / "tiny")
    names = {each.name for each in where.iterdir()}
    files = json.loads((where / MANIFEST).read_text())["files"]
    assert names == set(files) | {MANIFEST}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}


def test_a_flipped_byte_in_any_file_is_found_and_the_one_before_taken(halfway: Path, tiny_shards: Path, tmp_path: Path):
    from distav.training.checkpoint.manager import CheckpointManager

    names = sorted(each.name for each in last_checkpoint(halfway / "tiny").iterdir())
    for name in names:
        for place in ("first", "middle", "last"):
            checkpoints = copied(halfway, tmp_path / name / place)
            path = last_checkpoint(checkpoints.parent) / name
            content = bytearray(path.read_bytes())
            at = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]
            content[at] ^= 0x10
            path.write_bytes(content)
            fault = CheckpointManager(checkpoints, 2).verify(path.parent)
            assert fault and name in fault, (name, place, fault)


@pytest.mark.parametrize(
    "damage",
    ["altered", *(pytest.param(each, marks=pytest.mark.long) for each in ("truncated", "missing", "no manifest"))],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    halfway: Path, undamaged: Path, tiny_shards: Path, tmp_path: Path, damage: str
):
    checkpoints = copied(halfway, tmp_path)
    newest, before = sorted(checkpoints.glob("step-*"))[::-1]
    path = newest / ("bank-00001.safetensors" if damage != "no manifest" else MANIFEST)
    if damage == "altered":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    team = run_whole(2, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert f"checkpoint {newest.name}: {path.name}" in team.said()
    assert f"resuming in phase contrastive after step {int(before.name[5:14])}" in team.said()
    assert (checkpoints / f".broken-{newest.name}").is_dir()
    assert fingerprint(tmp_path / "tiny") == fingerprint(undamaged)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(
    halfway: Path, tiny_shards: Path, tmp_path: Path
):
    for each in copied(halfway, tmp_path).glob("step-*"):
        (each / "state.json").write_text("{}")
    team = Team(1, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert team.end() == [1] and "No valid checkpoint in" in team.said()
    assert len(list((tmp_path / "tiny" / "checkpoints").glob("step-*"))) == 2


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(where)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False)


@pytest.mark.parametrize("fault", ["full", pytest.param("read-only", marks=pytest.mark.long)])
def test_a_save_that_fails_is_told_and_the_next_one_succeeds(
    tiny_shards: Path, tmp_path: Path, small_disk: Path, fault: str
):
    given = arguments(tmp_path, tiny_shards, "run.checkpoint_every=2")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoints").symlink_to(small_disk)
    if fault == "full":
        fill(small_disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    team = Team(2, given, tmp_path / "logs")
    told = "No space left on device" if fault == "full" else "Read-only file system"
    team.wait_for(lambda: "Failed to write a checkpoint" in team.said())
    assert told in team.said()
    if fault == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert team.end() == [0, 0], team.said()[-6000:]
    assert last_checkpoint(tmp_path / "tiny").name.startswith("step-000000020-003")
    steps = [each["step"] for each in records(tmp_path / "tiny") if "train/loss" in each]
    assert steps == list(range(1, 21))


@pytest.mark.long
def test_a_run_that_could_not_save_its_end_says_so(tiny_shards: Path, tmp_path: Path, small_disk: Path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoints").symlink_to(small_disk)
    fill(small_disk)
    team = Team(1, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert team.end() == [1], team.said()[-6000:]
    assert "Failed to write the final checkpoint" in team.said() and "No space left" in team.said()
    assert (tmp_path / "tiny" / "report.json").exists()
