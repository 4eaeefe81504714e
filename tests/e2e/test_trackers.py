"""A training of two ranks with all trackers."""

import json
from pathlib import Path

import pytest

from tests.helpers.launch import losses_by_step, tiny_config, train


@pytest.mark.long
def test_two_ranks_log_one_run_to_each_tracker(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="needs pip install 'distav[wandb]'")
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'distav[mlflow]'")
    pytest.importorskip("trackio", reason="needs pip install 'distav[trackio]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    overrides = [f"data.root={tiny_shards}", f"run.root={tmp_path}", "monitor.trackers=[wandb,mlflow,trackio]"]
    output = train(tiny_config(tmp_path), *overrides, ranks=2, launcher=True)
    assert "gets no further values" not in output, "a tracker was disabled"
    run = tmp_path / "tiny"
    expected = losses_by_step(run)
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    client = mlflow.MlflowClient()
    (experiment,) = [found for found in client.search_experiments() if found.name == "distav"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == ((run / "trackers" / "mlflow.id").read_text(), "FINISHED")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(expected)
    images = {artifact.path for artifact in client.list_artifacts(found.info.run_id, "labels")}
    assert images == {"labels/given_vs_corrected", "labels/confidence"}
    report = client.download_artifacts(found.info.run_id, "report.json", str(tmp_path))
    assert json.loads(Path(report).read_text()) == json.loads((run / "report.json").read_text())
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("distav") == ["tiny"]
    rows = SQLiteStorage.get_logs("distav", "tiny")
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == pytest.approx(expected)
