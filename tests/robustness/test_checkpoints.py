"""Corrupt checkpoints are detected and set aside; a save that fails does not end the run."""

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
from distav.training.checkpoint.manager import CheckpointManager
from tests.helpers.launch import arguments, read_metrics
from tests.helpers.rank_group import RankGroup, fingerprint, last_checkpoint, run_to_completion


@pytest.fixture(scope="module")
def halfway(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, stopped in phase 1, with two valid checkpoints."""
    folder = tmp_path_factory.mktemp("halfway")
    group = RankGroup(2, arguments(folder, tiny_shards), folder / "logs")
    group.wait_for(lambda: "step 6/12 phase=contrastive" in group.output())
    group.signal(signal.SIGTERM, 0)
    group.wait()
    return folder


@pytest.fixture(scope="module")
def uninterrupted(halfway: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, resumed and finished without damage."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    copy_of(halfway, folder)
    run_to_completion(2, arguments(folder, tiny_shards), folder / "logs")
    return folder / "tiny"


def copy_of(halfway: Path, tmp_path: Path) -> Path:
    """Copy a run; returns the directory of its checkpoints."""
    shutil.copytree(halfway / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny" / "checkpoints"


def test_checkpoint_has_a_manifest_and_no_executable_content(halfway: Path):
    checkpoint = last_checkpoint(halfway / "tiny")
    names = {path.name for path in checkpoint.iterdir()}
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert names == set(files) | {MANIFEST}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}


def test_flipped_bit_is_detected_in_each_file(halfway: Path, tmp_path: Path):
    names = sorted(path.name for path in last_checkpoint(halfway / "tiny").iterdir())
    for name in names:
        for position in ("first", "middle", "last"):
            checkpoints = copy_of(halfway, tmp_path / name / position)
            path = last_checkpoint(checkpoints.parent) / name
            content = bytearray(path.read_bytes())
            offset = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[position]
            content[offset] ^= 0x10
            path.write_bytes(content)
            error = CheckpointManager(checkpoints, 2).verify(path.parent)
            assert error and name in error, (name, position, error)


@pytest.mark.parametrize(
    "damage",
    ["altered", *(pytest.param(name, marks=pytest.mark.long) for name in ("truncated", "missing", "no manifest"))],
)
def test_corrupt_checkpoint_is_set_aside_and_the_previous_one_used(
    halfway: Path, uninterrupted: Path, tiny_shards: Path, tmp_path: Path, damage: str
):
    checkpoints = copy_of(halfway, tmp_path)
    newest, previous = sorted(checkpoints.glob("step-*"))[::-1]
    path = newest / ("bank-00001.safetensors" if damage != "no manifest" else MANIFEST)
    if damage == "altered":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    group = run_to_completion(2, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert f"checkpoint {newest.name}: {path.name}" in group.output()
    assert f"resuming in phase contrastive after step {int(previous.name[5:14])}" in group.output()
    assert (checkpoints / f".broken-{newest.name}").is_dir()
    assert fingerprint(tmp_path / "tiny") == fingerprint(uninterrupted)


def test_run_without_a_valid_checkpoint_does_not_start_over(halfway: Path, tiny_shards: Path, tmp_path: Path):
    for checkpoint in copy_of(halfway, tmp_path).glob("step-*"):
        (checkpoint / "state.json").write_text("{}")
    group = RankGroup(1, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert group.wait() == [1] and "No valid checkpoint in" in group.output()
    assert len(list((tmp_path / "tiny" / "checkpoints").glob("step-*"))) == 2


def fill(disk: Path) -> None:
    """Write to a disk until it is full."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"a file system cannot be mounted: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize("fault", ["full", pytest.param("read-only", marks=pytest.mark.long)])
def test_failed_save_is_logged_and_the_next_one_succeeds(
    tiny_shards: Path, tmp_path: Path, small_disk: Path, fault: str
):
    options = arguments(tmp_path, tiny_shards, "run.checkpoint_every=2")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoints").symlink_to(small_disk)
    if fault == "full":
        fill(small_disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    group = RankGroup(2, options, tmp_path / "logs")
    reason = "No space left on device" if fault == "full" else "Read-only file system"
    group.wait_for(lambda: "Failed to write a checkpoint" in group.output())
    assert reason in group.output()
    if fault == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert group.wait() == [0, 0], group.output()[-6000:]
    assert last_checkpoint(tmp_path / "tiny").name.startswith("step-000000020-003")
    steps = [record["step"] for record in read_metrics(tmp_path / "tiny") if "train/loss" in record]
    assert steps == list(range(1, 21))


@pytest.mark.long
def test_failure_of_the_final_save_ends_the_run_with_an_error(tiny_shards: Path, tmp_path: Path, small_disk: Path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoints").symlink_to(small_disk)
    fill(small_disk)
    group = RankGroup(1, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert group.wait() == [1], group.output()[-6000:]
    assert "Failed to write the final checkpoint" in group.output() and "No space left" in group.output()
    assert (tmp_path / "tiny" / "report.json").exists()
