"""Several labels per clip end to end: training, correction of label lists, evaluation, audit and cleaning."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.config.loading import load
from distav.data.annotations.multi_labels import class_matrix, load_multi_labels
from distav.data.data_module import DataModule
from distav.data.dataset import ShardedDataset
from distav.data.preparation.multi_label_noise import ClassRates
from distav.evaluate import main as evaluate
from distav.tools.audit.command import main as audit
from distav.tools.make_shards import main as make_shards
from distav.training.validation import validate_labels
from tests.e2e.test_audit import browser, open_page  # noqa: F401
from tests.helpers.launch import losses, tiny_config, train
from tests.helpers.multi_label import multi_label_shards

BASE = """defaults: [schema, _self_]
run: {name: tiny, device: cpu, log_every: 1, checkpoint_every: 100}
data: {num_frames: 2, frame_stride: 2, frame_size: 24, audio_s: 1.0}
augment: {hue: 0.02, crop_area_min: 0.8, brightness: 0.1, contrast: 0.1, saturation: 0.1, audio_shift_s: 0.1}
model: {embed_dim: 32, hidden_dim: 64, visual: {width: 8}, audio: {width: 8, num_mels: 32}}
optim: {global_batch: 40}
monitor: {media_every: 1000, media_clips: 0}
"""
CONFIG = (
    BASE
    + """phases:
  contrastive: {kind: contrastive, epochs: 7}
  correction: {kind: label_correction, num_neighbors: [10, 30], vote_temperatures: [0.2], whitening_powers: [0.5]}
  learn: {kind: supervised, epochs: 4, loss: asymmetric, asymmetric_gamma_negative: 1, class_balance: 0.3}
"""
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("multi") / "shards"
    return multi_label_shards(out, 360, 60, ClassRates(0.2, 0.4), ClassRates(0.04, 0.04))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a finished run, and its output."""
    folder = tmp_path_factory.mktemp("run")
    output = train(tiny_config(folder, CONFIG), f"data.root={shards}", f"run.root={folder}")
    return folder / "tiny", output


def lists_of(root: Path, split: str = "train"):
    dataset = ShardedDataset.open(root)
    return load_multi_labels(dataset, dataset.split(split))


def test_rates_are_estimated_and_corrected_lists_are_closer_to_the_true_ones(finished: tuple[Path, str], shards: Path):
    run, output = finished
    labels = lists_of(shards)
    assert labels.true is not None
    report = json.loads((run / "report.json").read_text())
    (correction,) = report["corrections"]
    noise = json.loads((shards / "manifest.json").read_text())["splits"]["train"]["noise"]
    assert noise["missing_label_rate"] == pytest.approx(0.29, abs=0.03)
    for name, tolerance in (("missing_label_rate", 0.05), ("wrong_label_rate", 0.02)):
        assert correction[name]["estimate"] == pytest.approx(noise[name], abs=tolerance)
        assert correction[f"{name}_by_class"].keys() == set(labels.classes)
    table = pq.read_table(run / "labels" / "correction.parquet")
    corrected = class_matrix(table.column("corrected_label").to_pylist(), labels.classes, "table")
    posterior = np.array(table.column("posterior").to_pylist())
    assert np.array_equal(corrected, posterior > 0.5)
    given_errors, corrected_errors = (labels.given != labels.true).mean(), (corrected != labels.true).mean()
    assert corrected_errors < 0.4 * given_errors
    accuracy = correction["label_accuracy"]
    assert accuracy["given"] == pytest.approx(1 - given_errors)
    assert accuracy["corrected"] == pytest.approx(1 - corrected_errors)
    assert report["given_labels_by_class"] == dict(zip(labels.classes, labels.given.sum(0).tolist(), strict=True))
    assert "Labels:     F1 " in output and "Noise:      missing label rate" in output and "mAP" in output
    assert "missing label rate" in (run / "export" / "README.md").read_text()


def test_classifiers_are_evaluated_on_the_test_split(finished: tuple[Path, str], shards: Path):
    run, _ = finished
    test = json.loads((run / "report.json").read_text())["test"]
    labels = lists_of(shards, "test").reference
    assert test["chance"] == pytest.approx(labels.mean(0).mean())
    assert test["map"] > 0.85 > 2 * test["chance"] and test["f1_micro"] > 0.8 and test["d_prime"] > 1.5
    assert {f"{name}{suffix}" for name in ("map", "f1_macro") for suffix in ("", "_visual", "_audio")} <= test.keys()
    assert test["by_class"].keys() == {"both", "visual", "audio"}
    scores = test["by_class"]["both"]
    assert [scores[name]["clips"] for name in scores] == labels.sum(0).tolist()
    assert test["map"] == pytest.approx(np.mean([values["average_precision"] for values in scores.values()]))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["test/map"] == test["map"]
    assert any("labels/missing_rate" in record for record in records)


def test_frozen_features_are_evaluated_on_lists(
    finished: tuple[Path, str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(finished[0] / "export"), str(shards), "--device", "cpu", "--threads", "1"]
    corrected = str(finished[0] / "labels" / "correction.parquet")
    tune = ["--tasks", "knn", "linear_probe", "svm", "retrieval", "fine_tune", "--epochs", "1", "--global-batch", "40"]
    words += [*tune, "--out", str(tmp_path / "tuned"), "--labels", corrected]
    assert evaluate([*words, "--json", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert (
        metrics["svm"]["map_both"] > 0.8
        and metrics["linear_probe"]["map_both"] > 0.85
        and metrics["knn"]["map_both"] > 0.7
    )
    assert metrics["knn"].keys() == {
        f"{score}_{name}"
        for score in ("map", "f1_micro", "f1_macro", "d_prime")
        for name in ("visual", "audio", "both")
    }
    assert 0.3 < metrics["fine_tune"]["map_both"] <= 1
    assert re.search(r"task +modality +map, %.*\n(.*\n)*svm +both +\d", capsys.readouterr().out)
    assert "rsum" in metrics["retrieval"]


def test_issues_are_reviewed_and_decisions_clean_the_dataset(
    finished: tuple[Path, str],
    shards: Path,
    tmp_path: Path,
    browser,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    run = tmp_path / "tiny"
    shutil.copytree(finished[0], run)
    words = ["--shards", str(shards), "--limit", "10", "--neighbors", "3", "--export", "csv"]
    assert audit([str(run), *words]) == 0
    assert re.search(r"labels of the \d+ clips of the split test are not checked", capsys.readouterr().out)
    issues = pq.read_table(run / "issues.parquet").to_pylist()
    labels = lists_of(shards)
    assert labels.true is not None
    right = [
        labels.true[row["id"], labels.classes.index(row["class"])] == (row["issue"] == "missing") for row in issues
    ]
    first = [right[index] for kind in ("missing", "wrong") for index in _first(issues, kind, 10)]
    assert np.mean(first) >= 0.9
    exported = list(csv.DictReader((run / "audit-csv" / "clips.csv").open()))
    assert exported and all((run / "audit-csv" / row["path"]).is_file() for row in exported)
    page, messages = open_page(browser, run / "audit.html")
    assert page.locator("nav button").all_inner_texts()[2] == "Overview"
    page.keyboard.press("a")
    page.keyboard.press("r")
    page.keyboard.press("2")
    page.keyboard.press("a")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "decisions.csv")
    rows = list(csv.DictReader((tmp_path / "decisions.csv").open()))
    assert [row["decision"] for row in rows] == ["add", "keep", "remove"] and messages == []
    page.close()
    clean = ["clean", str(shards), str(tmp_path / "clean"), "--decisions", str(tmp_path / "decisions.csv")]
    assert make_shards([*clean, "--labels", str(run / "labels" / "correction.parquet"), "--workers", "1"]) == 0
    cleaned = lists_of(tmp_path / "clean")
    assert cleaned.true is not None and np.array_equal(cleaned.true, labels.true)
    assert (cleaned.given != labels.true).mean() < 0.5 * (labels.given != labels.true).mean()
    ids = {key: sample for sample, key in enumerate(ShardedDataset.open(shards).split("train").keys.tolist())}
    for row in rows[:1] + rows[2:]:
        column = labels.classes.index(row["class"])
        assert cleaned.given[ids[row["key"]], column] == (row["decision"] == "add")


def _first(issues: list[dict], kind: str, count: int) -> list[int]:
    return [index for index, row in enumerate(issues) if row["issue"] == kind][:count]


def test_two_ranks_train_as_one(shards: Path, tmp_path: Path):
    phases = (
        "phases:\n"
        "  given: {kind: supervised, epochs: 1, targets: given, loss: bce, class_balance: 0.5, logit_adjustment: 1}\n"
        "  after: {kind: label_correction, num_neighbors: [10], vote_temperatures: [0.2], whitening_powers: [0.5]}\n"
    )
    results = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        output = train(tiny_config(folder, BASE + phases), f"data.root={shards}", f"run.root={folder}", ranks=ranks)
        assert "the features were trained on the given labels: their votes reproduce wrong labels" in output
        report = json.loads((folder / "tiny" / "report.json").read_text())
        posterior = pq.read_table(folder / "tiny" / "labels" / "after.parquet").column("posterior").to_pylist()
        results.append((losses(folder / "tiny"), report["test"]["map"], np.array(posterior)))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-3)
    assert results[1][1] == pytest.approx(results[0][1], abs=0.02)
    assert results[1][2].shape == (360, 6) and np.abs(results[1][2] - results[0][2]).mean() < 0.02


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (
            "{kind: supervised, targets: given}",
            "phases.p.loss=ce: clips of .* may have several classes; allowed: bce, ",
        ),
        ("{kind: supervised, targets: hybrid, loss: bce}", "phases.p.targets=hybrid: .*allowed: given, posterior"),
        ("{kind: label_correction, pseudo_labels: x}", "phases.p.pseudo_labels=x: .*several classes; leave it empty"),
    ],
)
def test_settings_for_one_label_per_clip_are_rejected(shards: Path, tmp_path: Path, phase: str, message: str):
    text = BASE + f"phases:\n  c: {{kind: label_correction, num_neighbors: [10]}}\n  p: {phase}\n"
    config = load(tiny_config(tmp_path, text), [f"data.root={shards}"])
    with pytest.raises(UserError, match=message):
        validate_labels(config, DataModule.open(config))
