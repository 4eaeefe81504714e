"""The mirror of a run: copies, interrupted copies, deletion, restoring, corrupt copies and errors."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import Config
from distav.data.integrity import MANIFEST, file_entry, write_manifest
from distav.data.storage import object_store
from distav.data.storage.errors import StorageError
from distav.distributed.process_group import World
from distav.training.checkpoint.files import list_checkpoints
from distav.training.checkpoint.manager import CheckpointManager
from distav.training.checkpoint.mirror import RunMirror
from distav.training.checkpoint.mirror_uploader import MirrorUploader
from distav.training.run_dir import lock_run_dir
from distav.training.run_state import Progress
from distav.training.validation import validate_names
from tests.helpers.launch import tiny_config
from tests.helpers.stores import CREDENTIALS, Bucket, bucket

WORLD = World(0, 1, 0, torch.device("cpu"))
STEP_1, STEP_2, STEP_3, STEP_4 = (Progress(total_steps=step).name for step in range(1, 5))


@pytest.fixture(scope="module")
def store() -> Iterator[Bucket]:
    with bucket() as store:
        yield store


@pytest.fixture(autouse=True)
def environment(store: Bucket, monkeypatch: pytest.MonkeyPatch):
    for name, value in (CREDENTIALS | store.environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 0.01)


@pytest.fixture(params=["directory", "s3"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return str(tmp_path / "mirror") if request.param == "directory" else f"s3://clips/{tmp_path.name}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    write(folder / "config.yaml", "run: {name: tiny}")
    write(folder / "environment.json", "{}")
    write(folder / "metrics.jsonl", "{}\n")
    write(folder / "labels" / "correct.parquet", "labels")
    write(folder / "labels" / "correct.parquet.0123.part", "incomplete")
    write(folder / "tensorboard" / "events.1", "events")
    write(folder / "trackers" / "wandb.id", "abc")
    write(folder / "logs" / "rank_001.log", "not a result")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def checkpoint(run: Path, name: str, text: str = "") -> Path:
    folder = run / "checkpoints" / name
    files = ["state.json", "engine-00000.safetensors", "engine-00001.safetensors"]
    for file in files:
        write(folder / file, f"{text or name} {file}")
    write_manifest(folder, {file: file_entry(folder / file) for file in files})
    return folder


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_checkpoints_and_results_are_copied_and_restored(root: str, run: Path, tmp_path: Path):
    mirror = RunMirror(root, run, 2)
    assert mirror.read_config() is None and mirror.list_checkpoints() == []
    mirror.upload(checkpoint(run, STEP_1))
    names = {name for name in mirror.store.sizes() if not name.startswith("checkpoints/")}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "labels/correct.parquet", "tensorboard/events.1",
        "trackers/wandb.id",
    }  # fmt: skip
    assert mirror.read_config() == "run: {name: tiny}" and mirror.list_checkpoints() == [STEP_1]
    other = RunMirror(root, tmp_path / "elsewhere" / "tiny", 2)
    assert other.download(STEP_1, other.folder / "incomplete") is None
    assert files(other.folder / "incomplete") == files(run / "checkpoints" / STEP_1)
    for name in names - {"config.yaml", "environment.json"}:
        assert (other.folder / name).read_text() == (run / name).read_text()


def test_only_changed_results_are_copied_again(root: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    mirror, copied = RunMirror(root, run, 2), list[str]()
    upload = mirror.store.upload
    monkeypatch.setattr(mirror.store, "upload", lambda path, name: (copied.append(name), upload(path, name)))
    newest = checkpoint(run, STEP_1)
    mirror.upload(newest)
    assert len(copied) == 6 + 4 and copied[-1] == f"checkpoints/{STEP_1}/{MANIFEST}"
    copied.clear()
    mirror.upload(newest)
    assert copied == []
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write("{}\n")
    write(run / "report.json", "{}")
    mirror.upload(newest)
    assert copied == ["metrics.jsonl", "report.json"]
    assert mirror.store.read("metrics.jsonl") == b"{}\n{}\n"


@pytest.mark.parametrize("failing", ["engine-00001.safetensors", MANIFEST])
def test_interrupted_copy_is_no_checkpoint_and_is_completed_by_the_next_one(
    root: str, run: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    mirror = RunMirror(root, run, 2)
    mirror.upload(checkpoint(run, STEP_1))
    upload = mirror.store.upload

    def fail(path: Path, name: str) -> None:
        if path.name == failing:
            raise StorageError(mirror.location, "the network is down", "Wait.", "run.mirror")
        upload(path, name)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=f"run.mirror={root}/tiny: the network"):
        patch.setattr(mirror.store, "upload", fail)
        mirror.upload(checkpoint(run, STEP_2))
    assert mirror.list_checkpoints() == [STEP_1]
    mirror.upload(run / "checkpoints" / STEP_2)
    assert mirror.list_checkpoints() == [STEP_1, STEP_2]


def test_old_incomplete_and_later_checkpoints_are_deleted(root: str, run: Path):
    mirror = RunMirror(root, run, 2)
    for name in (STEP_1, STEP_2, STEP_4):
        mirror.upload(checkpoint(run, name))
    assert mirror.list_checkpoints() == [STEP_2, STEP_4]
    mirror.store.upload(run / "config.yaml", f"checkpoints/{STEP_1}/state.json")
    mirror.store.upload(run / "config.yaml", "checkpoints/notes.txt")
    mirror.upload(checkpoint(run, STEP_3))
    checkpoints = {name.split("/")[1] for name in mirror.store.sizes() if name.startswith("checkpoints/")}
    assert checkpoints == {STEP_2, STEP_3, "notes.txt"}


def test_step_that_is_saved_again_replaces_its_copy(root: str, run: Path, tmp_path: Path):
    mirror = RunMirror(root, run, 2)
    mirror.upload(checkpoint(run, STEP_1))
    mirror.upload(checkpoint(run, STEP_1, "after a rollback"))
    assert mirror.download(STEP_1, tmp_path / "copy") is None
    assert files(tmp_path / "copy")["state.json"] == "after a rollback state.json"


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "manifest"])
def test_corrupt_checkpoint_of_the_mirror_is_not_restored(root: str, run: Path, tmp_path: Path, damage: str):
    mirror = RunMirror(root, run, 2)
    mirror.upload(checkpoint(run, STEP_1))
    name = MANIFEST if damage == "manifest" else "engine-00001.safetensors"
    content = bytearray((run / "checkpoints" / STEP_1 / name).read_bytes())
    content[3] ^= 1
    write(tmp_path / "damaged", "")
    (tmp_path / "damaged").write_bytes(content[:-1] if damage == "truncated" else content)
    if damage == "missing":
        mirror.store.delete(f"checkpoints/{STEP_1}/{name}")
    else:
        mirror.store.upload(tmp_path / "damaged", f"checkpoints/{STEP_1}/{name}")
    other = RunMirror(root, tmp_path / "elsewhere" / "tiny", 2)
    error = other.download(STEP_1, other.folder / "incomplete")
    assert error and name in error
    assert not (other.folder / "incomplete").exists() and not (other.folder / "metrics.jsonl").exists()


def restore(run: Path, root: str, warnings: list[str]) -> str:
    """Restore as at the start of a run; returns the content of the checkpoint's state.json."""
    manager = CheckpointManager(run / "checkpoints", 2, RunMirror(root, run, 2))
    manager._load = lambda folder, *_: (folder / "state.json").read_text()  # pyright: ignore
    return manager.restore(None, None, warnings.append)  # pyright: ignore


def test_newest_valid_checkpoint_of_run_directory_and_mirror_is_restored(root: str, run: Path, tmp_path: Path):
    mirror, warnings = RunMirror(root, run, 3), list[str]()
    for name in (STEP_1, STEP_2, STEP_3):
        mirror.upload(checkpoint(run, name))
    other = tmp_path / "elsewhere" / "tiny"
    assert restore(other, root, warnings) == f"{STEP_3} state.json"  # An empty disk.
    assert (other / "labels" / "correct.parquet").exists()
    checkpoint(other, STEP_4)
    write(other / "metrics.jsonl", "newer")
    assert restore(other, root, warnings) == f"{STEP_4} state.json" and not warnings
    assert (other / "metrics.jsonl").read_text() == "newer"
    write(other / "checkpoints" / STEP_4 / "state.json", "{}")
    write(other / "checkpoints" / STEP_3 / "state.json", "{}")
    assert restore(other, root, warnings) == f"{STEP_3} state.json"  # Corrupt on the disk, valid in the mirror.
    assert len(warnings) == 2 and all("using the mirror" in warning for warning in warnings)
    assert (other / "metrics.jsonl").read_text() == "{}\n"
    shutil.rmtree(other)
    warnings.clear()
    mirror.store.upload(run / "config.yaml", f"checkpoints/{STEP_3}/state.json")
    assert restore(other, root, warnings) == f"{STEP_2} state.json"
    assert len(warnings) == 1 and f"{root}/tiny: checkpoint {STEP_3}: state.json has" in warnings[0]
    shutil.rmtree(other)
    for name in (STEP_1, STEP_2):
        mirror.store.upload(run / "config.yaml", f"checkpoints/{name}/state.json")
    with pytest.raises(UserError, match=rf"No valid checkpoint in {root}/tiny \({STEP_3}: state.*and its mirror"):
        restore(other, root, warnings)


def test_names_that_lead_out_of_the_run_directory_are_not_restored(root: str, run: Path, tmp_path: Path):
    mirror = RunMirror(root, run, 2)
    mirror.upload(checkpoint(run, STEP_1))
    sizes = mirror.store.sizes() | {"labels/../../evil": 1, "labels//x": 1, "../labels/x": 1, "other.sh": 1}
    mirror.store.sizes = lambda: sizes
    shutil.rmtree(run)
    assert mirror.download(STEP_1, tmp_path / "copy") is None
    assert {path.name for path in tmp_path.rglob("*")} & {"evil", "x", "other.sh"} == set()


def test_checkpoint_that_is_being_copied_is_kept_on_the_disk(run: Path, tmp_path: Path):
    mirror, blocked, started = RunMirror(str(tmp_path / "mirror"), run, 2), threading.Event(), threading.Event()
    upload = mirror.store.upload

    def wait_and_upload(path: Path, name: str) -> None:
        started.set()
        assert blocked.wait(30)
        upload(path, name)

    mirror.store.upload = wait_and_upload
    manager = CheckpointManager(run / "checkpoints", 2, mirror)
    for name in (STEP_1, STEP_2, STEP_3, STEP_4):
        manager._publish(checkpoint(run, name))
        assert started.wait(30)  # The copy of the first one is in progress.
    assert [path.name for path in list_checkpoints(manager.folder)] == [STEP_1, STEP_3, STEP_4]
    blocked.set()
    manager.finish_uploading()
    assert [path.name for path in list_checkpoints(manager.folder)] == [STEP_3, STEP_4]
    assert mirror.list_checkpoints()[-1] == STEP_4 and STEP_3 not in mirror.list_checkpoints()


def test_failed_copy_is_reported_and_tried_again(run: Path, tmp_path: Path):
    mirror = RunMirror(str(tmp_path / "mirror"), run, 2)
    write(tmp_path / "mirror", "a file in place of the directory")
    uploader = MirrorUploader(mirror, run / "checkpoints")
    uploader.queue(checkpoint(run, STEP_1))
    uploader.start()
    deadline = time.monotonic() + 30
    while uploader.in_use():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    error = uploader.take_error()
    assert f"run.mirror={tmp_path / 'mirror' / 'tiny'}: config.yaml cannot be read or written" in error
    assert uploader.take_error() == ""
    (tmp_path / "mirror").unlink()
    uploader.queue(checkpoint(run, STEP_2))
    uploader.finish()
    assert mirror.list_checkpoints() == [STEP_2]
    shutil.rmtree(tmp_path / "mirror")
    write(tmp_path / "mirror", "")
    with pytest.raises(
        UserError, match="Failed to copy the run to its mirror: run.mirror=.*run the same command again"
    ):
        uploader.finish()


def lock(tmp_path: Path, *overrides: str) -> Config:
    """Open a run directory as a run does at its start."""
    config = loading.load(tiny_config(tmp_path), [f"run.root={tmp_path / 'runs'}", *overrides])
    validate_names(config)
    folder = Path(config.run.root) / config.run.name
    mirror = RunMirror(config.run.mirror, folder, 2) if config.run.mirror else None
    with lock_run_dir(folder, config, WORLD, mirror):
        return config


def test_mirror_of_another_run_is_rejected(root: str, tmp_path: Path):
    lock(tmp_path, f"run.mirror={root}")
    shutil.rmtree(tmp_path / "runs")
    lock(tmp_path, f"run.mirror={root}", "run.log_every=3")
    shutil.rmtree(tmp_path / "runs")
    message = (
        f"run.mirror={root}/tiny holds a run with other settings .recorded: optim.lr=0.001, requested: optim.lr=2.0"
    )
    with pytest.raises(UserError, match=message):
        lock(tmp_path, f"run.mirror={root}", "optim.lr=2")
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()
    lock(tmp_path, f"run.mirror={root}2")
    lock(tmp_path)
    mirror = RunMirror(root, tmp_path / "x", 2)
    mirror.store.upload(tmp_path / "tiny.yaml", "clips.csv")
    with pytest.raises(UserError, match="it holds clips.csv, but no config.yaml of a run"):
        lock(tmp_path, f"run.mirror={root}", "run.name=x")


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ("ftp://host/runs", "run.mirror=ftp://host/runs.*: allowed: a directory, or a URL with s3, gs, gcs"),
        ("https://host/runs", "run.mirror=https://host/runs.*: allowed: a directory, or a URL with s3, gs, gcs"),
        ("s3://me:secret@bucket", "run.mirror=s3://...: allowed: s3://bucket/directory"),
        ("ROOT", "run.mirror=.*this is run.root"),
        ("s3://no-such-bucket/runs", "run.mirror=s3://no-such-bucket/runs/tiny: config.yaml: no such file or bucket"),
        (
            "/proc/runs",
            r"run.mirror=/proc/runs/tiny: config.yaml .*\(No such file.*Give a directory that can be written",
        ),
    ],
)
def test_unusable_mirrors_are_rejected_before_training(tmp_path: Path, mirror: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        lock(tmp_path, f"run.mirror={mirror.replace('ROOT', str(tmp_path / 'runs'))}")
    assert "secret" not in str(error.value)


def test_missing_credentials_and_packages_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(UserError, match=r"run.mirror=gs://b/tiny: package gcsfs .*pip install 'distav\[remote\]'"):
            lock(tmp_path, "run.mirror=gs://b")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"run.mirror=s3://b/tiny: no permission .*credentials.*writing and deleting"):
        lock(tmp_path, "run.mirror=s3://b")
