"""Trackers: what each of them stores, resuming, failures, and checks before a run."""

import importlib.util
import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import Config
from distav.distributed.process_group import World
from distav.training.metric_logger import MetricLogger
from distav.training.trackers import background, registry
from distav.training.trackers.external import ExternalTracker, TrackedRun
from tests.helpers.launch import tiny_config

IMAGE = np.zeros((4, 6, 3), np.uint8)


def needs(package: str) -> None:
    """Skip the test if a package is missing."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'distav[{package}]'")


def config_of(folder: Path, tracker: str) -> Config:
    return loading.load(tiny_config(folder), [f"monitor.trackers=[{tracker}]", "run.name=first", "optim.lr=0.02"])


def log_twice(folder: Path, tracker: str) -> str:
    """Log steps 1 and 2, resume after step 1, log steps 2 and 3; return the identity that the run directory stores."""
    config = config_of(folder, tracker)
    for first, last in ((1, 2), (2, 3)):
        logger = MetricLogger(folder, World(0, 1, 0, torch.device("cpu")))
        logger.resume_at(first - 1, 0)
        logger.open_trackers(config)
        for step in range(first, last + 1):
            logger.log_metrics(step, {"train/loss": 10.0 * first + step, "phase": "contrastive"})
            logger.image("input/frames", IMAGE, step)
        logger.log_metrics(last, {"test/v2a_recall@1": 0.25, "test/none": float("nan")})
        if last == 3:
            logger.report({"samples": 96})
        logger.close()
    return (folder / "trackers" / f"{tracker}.id").read_text()


def read_offline_run(path: Path) -> Iterator[bytes]:
    """Yield the records in a file of an offline run of W&B: the log format of LevelDB after a header of 7 bytes."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (rest := 2**15 - position % 2**15) < 7:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # A complete record, or its last part.
            yield parts
            parts = b""


def finished_offline_runs(folder: Path, number: int, timeout_s: float = 30.0) -> list[Any]:
    """Return the records of all offline runs of W&B, whose process may write the last ones after the run has ended."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + timeout_s
    while True:
        files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
        runs = [[wandb_internal_pb2.Record.FromString(data) for data in read_offline_run(path)] for path in files]
        is_finished = [bool(records) and records[-1].WhichOneof("record_type") == "exit" for records in runs]
        if len(runs) == number and all(is_finished):
            return [record for records in runs for record in records]
        assert time.monotonic() < deadline, f"{sum(is_finished)} of {number} runs have ended after {timeout_s} s"
        time.sleep(0.1)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "project")
    identity = log_twice(tmp_path, "wandb")
    records = finished_offline_runs(tmp_path, 2)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {identity}
    assert {(run.display_name, run.project) for run in runs} == {("first", "project")}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["optim"]["lr"] == 0.02
    rows = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    logged = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert logged == [(1, 11.0), (2, 12.0), (3, 23.0)]
    assert [row["step"] for row in rows if "input/frames" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "test/v2a_recall@1" in row] == [2, 3]
    assert not any("test/none" in row or "phase" in row for row in rows)
    summaries = [item for record in records if record.WhichOneof("record_type") == "summary"
                 for item in record.summary.update]  # fmt: skip
    assert any("report" in (item.key, *item.nested_key) and "96" in item.value_json for item in summaries)


@pytest.mark.parametrize("scheme", ["file:", pytest.param("sqlite:/", marks=pytest.mark.long)])
def test_mlflow(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs("mlflow")
    monkeypatch.chdir(tmp_path)  # MLflow writes the artifacts of a local database to the current directory.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}//{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "experiment")
    identity = log_twice(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(identity)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "experiment"
    assert run.data.params["optim.lr"] == "0.02" and run.data.params["phases.hybrid.kind"] == "supervised"
    history = client.get_metric_history(identity, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 11.0), (2, 12.0), (3, 23.0)]
    assert run.data.metrics["test/v2a_recall_at_1"] == 0.25
    images = [artifact.path for artifact in client.list_artifacts(identity, "input/frames")]
    assert [Path(path).name for path in images] == [f"step_{step:09d}.png" for step in (1, 2, 3)]
    report = client.download_artifacts(identity, "report.json", str(tmp_path))
    assert json.loads(Path(report).read_text()) == {"samples": 96}


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "project")
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    identity = json.loads(log_twice(tmp_path, "trackio"))
    storage = trackio.sqlite_storage.SQLiteStorage
    assert identity == {"project": "project", "name": "first"}
    assert storage.get_runs("project") == ["first"]
    rows = storage.get_logs("project", "first")
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 11), (2, 12), (3, 23)]
    assert [row["step"] for row in rows if "input/frames" in row] == [1, 2, 3]
    assert any("96" in str(row.get("report")) for row in rows)
    settings = storage.get_run_config("project", "first")
    assert settings and settings["optim"]["lr"] == 0.02


class FakeTracker(ExternalTracker):
    """Records its calls; fails where `fails` says."""

    package = "json"
    calls: ClassVar[list[Any]] = []
    fails: ClassVar[str] = ""

    def __init__(self, run: TrackedRun):
        if self.fails == "open":
            raise ConnectionError("no network")
        self.tracker_id = run.tracker_id or "new"
        self.calls.append(("open", run.name, run.tracker_id))

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        if self.fails == "slow":
            time.sleep(60)
        if self.fails == "log" and step == 2:
            raise ConnectionError("no network")
        self.calls.append((step, values))

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        self.calls.append((step, tag))

    def close(self) -> None:
        self.calls.append("closed")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    monkeypatch.setitem(registry.TRACKERS, "fake", FakeTracker)
    monkeypatch.setattr(FakeTracker, "calls", [])
    monkeypatch.setattr(FakeTracker, "fails", "")
    return FakeTracker


def open_logger(folder: Path, step: int = 0) -> MetricLogger:
    logger = MetricLogger(folder, World(0, 1, 0, torch.device("cpu")))
    logger.resume_at(step, 0)
    logger.open_trackers(config_of(folder, "fake"))
    return logger


def test_resumed_run_repeats_no_value(tmp_path: Path, fake: type[FakeTracker]):
    logger = open_logger(tmp_path)
    logger.log_metrics(1, {"train/loss": 1.0})
    logger.log_metrics(1, {"time/checkpoint_s": 0.1})
    logger.log_metrics(2, {"train/loss": 2.0})
    logger.resume_at(1, 0)
    logger.log_metrics(1, {"labels/changed_fraction": 0.5})
    logger.log_metrics(2, {"train/loss": 3.0})
    logger.close()
    with open(tmp_path / "trackers" / "fake.steps.jsonl", "a") as steps:
        steps.write('{"train/lo')  # As after a kill.
    logger = open_logger(tmp_path, 1)
    logger.log_metrics(2, {"train/loss": 4.0, "train/lr": 0.1})
    logger.log_metrics(3, {"train/loss": 5.0})
    logger.close()
    assert fake.calls == [
        ("open", "first", None),
        (1, {"train/loss": 1.0}),
        (1, {"time/checkpoint_s": 0.1}),
        (2, {"train/loss": 2.0}),
        (1, {"labels/changed_fraction": 0.5}),
        "closed",
        ("open", "first", "new"),
        (2, {"train/lr": 0.1}),
        (3, {"train/loss": 5.0}),
        "closed",
    ]


def test_failing_tracker_is_disabled_with_one_warning(
    tmp_path: Path, fake: type[FakeTracker], capsys: pytest.CaptureFixture[str]
):
    fake.fails = "log"
    logger = open_logger(tmp_path)
    for step in range(1, 6):
        logger.log_metrics(step, {"train/loss": float(step)})
    logger.close()
    assert fake.calls == [("open", "first", None), (1, {"train/loss": 1.0})]
    assert capsys.readouterr().out.count("monitor.trackers: fake failed (ConnectionError: no network)") == 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]


def test_slow_tracker_does_not_slow_the_run(
    tmp_path: Path, fake: type[FakeTracker], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake.fails = "slow"
    monkeypatch.setattr(background, "CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(background, "_MAX_WAITING", 20)
    logger = open_logger(tmp_path)
    started = time.monotonic()
    for step in range(50):
        logger.log_metrics(step, {"train/loss": 1.0})
    logger.close()
    assert time.monotonic() - started < 5
    assert capsys.readouterr().out.count("fake is 20 values behind") == 1
    assert any(thread.name == "tracker fake" and thread.daemon for thread in threading.enumerate())


def test_new_run_that_cannot_be_opened_is_an_error_and_a_resumed_one_a_warning(
    tmp_path: Path, fake: type[FakeTracker], capsys: pytest.CaptureFixture[str]
):
    fake.fails = "open"
    with pytest.raises(UserError, match="fake could not be opened.*no network.*remove fake"):
        open_logger(tmp_path)
    fake.fails = ""
    open_logger(tmp_path).close()
    fake.fails = "open"
    open_logger(tmp_path).close()
    assert "fake could not be opened" in capsys.readouterr().out


def test_unknown_and_missing_trackers(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"monitor.trackers=wandv: allowed: wandb, mlflow, trackio. Did you mean 'wan"):
        registry.check_trackers(["wandv"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow is not installed; run pip install 'distav\[mlflow\]'"):
        registry.check_trackers(["mlflow"])
    registry.check_trackers([])


def test_tracker_named_twice(fake: type[FakeTracker]):
    with pytest.raises(UserError, match="named twice"):
        registry.check_trackers(["fake", "fake"])
