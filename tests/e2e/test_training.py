"""Training on tiny shards: report, run directory, export, ranks, ZeRO stages, resuming and errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distav.config.loading import load, to_yaml
from distav.config.schema import DataConfig
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from distav.models.pretrained import load_encoders
from distav.training.run_dir import _first_difference
from tests.helpers.launch import ROOT, TINY, command, environment, losses, losses_by_step, tiny_config, train


def equal_fraction(column: Any, other: Any) -> float:
    """Return the fraction of rows in which two columns are equal."""
    return float(np.mean([a == b for a, b in zip(column.to_pylist(), other.to_pylist(), strict=True)]))


def test_report_contents(finished: tuple[Path, str], tiny_shards: Path):
    run, output = finished
    report = json.loads((run / "report.json").read_text())
    assert report["samples"] == 96 and report["quarantined_samples"] == []
    assert [(phase["name"], phase["kind"], phase["steps"]) for phase in report["phases"]] == [
        ("contrastive", "contrastive", 12),
        ("correction", "label_correction", 0),
        ("hybrid", "supervised", 8),
    ]
    assert all(phase["seconds"] > 0 and phase["clips_per_s"] > 0 for phase in report["phases"])
    assert report["label_accuracy"].keys() == {"given", "corrected", "wrong_labels_fixed", "right_labels_broken",
                                               "ece_held_out", "ece_posterior"}  # fmt: skip
    correction = report["corrections"][0]
    assert correction["phase"] == "correction"
    assert correction["label_noise_rate"].keys() == {"estimate", "ci95_low", "ci95_high"}
    assert correction["label_noise_rate_by_class"].keys() in (set(ShardedDataset.open(tiny_shards).classes), set())
    rate = correction["pair_mismatch_rate"]
    assert 0 <= rate["ci95_low"] <= rate["estimate"] <= rate["ci95_high"] <= 1
    assert report["label_accuracy"]["given"] == 0.75
    assert 0 <= report["correspondence_auroc"] <= 1
    recalls = {f"{direction}_recall@{k}" for direction in ("v2a", "a2v") for k in (1, 5, 10)}
    accuracies = {f"{metric}{head}" for metric in ("top1", "balanced_accuracy") for head in ("", "_visual", "_audio")}
    assert report["test"].keys() == accuracies | {"by_class", "v2a_map", "a2v_map", "rsum"} | recalls
    assert "of wrong labels fixed" in output and "Test:" in output


def test_output_that_is_no_terminal_has_one_line_per_step_and_no_control_characters(finished: tuple[Path, str]):
    lines = finished[1].splitlines()
    assert not any(character in finished[1] for character in "\x1b\r━")
    steps = [line for line in lines if line.startswith("step ")]
    assert all(re.fullmatch(r"step \d+/\d+ phase=\w+ loss=[\d.]+ .* eta [\d:]+", line) for line in steps)
    assert {line.split()[1] for line in steps} >= {"12/12", "8/8"}
    assert not any("evaluating" in line or "correcting labels" in line for line in lines)


def test_run_directory_contents(finished: tuple[Path, str], tiny_shards: Path):
    run, _ = finished
    table = pq.read_table(run / "labels" / "correction.parquet")
    expected = [
        "id",
        "key",
        "given_label",
        "corrected_label",
        "knn_label",
        "confidence",
        "self_confidence",
        "correspondence",
    ]
    assert table.column_names == expected and len(table) == 96
    accuracy = json.loads((run / "report.json").read_text())["label_accuracy"]["corrected"]
    labels = pq.read_table(tiny_shards / "labels.parquet", filters=[("split", "=", "train")])
    assert equal_fraction(table.column("corrected_label"), labels.column("true_label")) == pytest.approx(accuracy)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "audio": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/grad_norm", "time/clips_per_s", "time/data_wait_pct", "memory/peak_gib",
            "test/top1", "test/balanced_accuracy"} <= set(tags["scalars"])  # fmt: skip
    assert {"correspondence/similarity", "correspondence/weight", "labels/confidence"} <= set(tags["histograms"])
    assert {"input/frames", "input/spectrogram", "labels/given_vs_corrected", "labels/confidence"} <= set(
        tags["images"]
    )
    assert "input/audio_0" in tags["audio"]
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"] == version("torch")


def test_projector_shows_the_labels_of_the_correction(finished: tuple[Path, str]):
    run, _ = finished
    (folder,) = (run / "tensorboard").glob("*/clips")
    head, *lines = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert head[:2] == ["clip", "given"] and len(lines) == 96
    table = pq.read_table(run / "labels" / "correction.parquet").to_pylist()
    expected = [[row["key"], row["given_label"]] for row in table]
    if len(head) > 2:
        expected = [
            [*texts, row["corrected_label"], f"{row['confidence']:.3f}"]
            for texts, row in zip(expected, table, strict=True)
        ]
    assert lines == expected
    features = np.loadtxt(folder / "tensors.tsv")
    assert len(features) == 96 and np.linalg.norm(features, axis=1) == pytest.approx(np.full(96, 2**0.5), rel=1e-4)


def test_exported_encoders_reproduce_the_test_accuracy(finished: tuple[Path, str], tiny_shards: Path):
    run, _ = finished
    model, description = load_encoders(run / "export")
    inputs = description["input"]
    data = DataConfig(
        num_frames=inputs["num_frames"],
        frame_stride=inputs["frame_stride"],
        frame_size=inputs["frame_size"],
        audio_s=inputs["audio_s"],
    )
    shards = ShardedDataset.open(tiny_shards)
    loader = Loader(shards.split("test"), data, None, 0, 24, torch.device("cpu"))
    batch = loader.load(np.arange(24), 0)
    with torch.no_grad():
        logits = model(**batch.media, seeds=batch.seeds)["logits"]
    labels = pq.read_table(tiny_shards / "labels.parquet", filters=[("split", "=", "test")]).column("label")
    predicted = pa.array([description["classes"][number] for number in logits.argmax(1)])
    assert equal_fraction(predicted, labels) == pytest.approx(
        json.loads((run / "report.json").read_text())["test"]["top1"]
    )


def test_finished_run_is_not_repeated(finished: tuple[Path, str], tiny_shards: Path):
    run, _ = finished
    before = len(losses(run))
    options = (run.parent / "tiny.yaml", f"data.root={tiny_shards}", f"run.root={run.parent}")
    output = train(*options)
    assert "Done: 96 training clips" in output and len(losses(run)) == before
    output = train(*options, "optim.lr=0.5", status=1)
    assert "other settings" in output and "requested: optim.lr=0.5" in output


def test_setting_that_a_recorded_config_lacks_has_its_default():
    config = to_yaml(load(ROOT / "configs" / "quickstart.yaml"))
    older = "\n".join(line for line in config.splitlines() if "squash" not in line and "pseudo_labels" not in line)
    assert older != config and _first_difference(older, config) == ""
    assert "data.squash=False, requested: data.squash=True" in _first_difference(
        older, config.replace("squash: false", "squash: true")
    )
    fewer = "\n".join(config.split("phases:")[:1]) + "phases: {}\n"
    assert _first_difference(fewer, config) != ""


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 2, 3))])
def test_two_ranks_at_each_zero_stage_match_one_rank(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, stage: int
):
    run, _ = finished
    train(
        tiny_config(tmp_path),
        f"data.root={tiny_shards}",
        f"run.root={tmp_path}",
        f"deepspeed.zero_stage={stage}",
        # Stage 3 does not partition small tensors by default.
        *(["deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"] if stage == 3 else []),
        f"model.activation_checkpointing={stage == 3}",
        ranks=2,
    )
    alone, together = losses(run), losses(tmp_path / "tiny")
    assert len(alone) == len(together) == 20
    # The order of sums differs; later steps amplify the rounding errors.
    np.testing.assert_allclose(together[:12], alone[:12], rtol=1e-4 if stage == 0 else 1e-3)
    np.testing.assert_allclose(together[12:], alone[12:], rtol=1e-3)
    tables = [pq.read_table(folder / "labels" / "correction.parquet") for folder in (run, tmp_path / "tiny")]
    assert equal_fraction(*(table.column("corrected_label") for table in tables)) > 0.95


@pytest.mark.long  # Shorter tests cover bfloat16 engines at each stage, and event parsing at stage 3.
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_training_follows_fp32(finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, stage: int):
    arguments = (tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}")
    train(*arguments, "deepspeed.precision=bf16", f"deepspeed.zero_stage={stage}", ranks=2)
    low, full = losses(tmp_path / "tiny"), losses(finished[0])
    for phase in (slice(0, 12), slice(12, 20)):  # Means, because the initial weights of stage 3 differ in bfloat16.
        assert np.mean(low[phase]) == pytest.approx(np.mean(full[phase]), rel=0.04)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
def test_killed_run_resumes_with_the_same_losses(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, stage: int
):
    arguments = (tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}", "run.checkpoint_every=3",
                 f"deepspeed.zero_stage={stage}")  # fmt: skip
    process = subprocess.Popen(
        command(*arguments),
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "tiny" / "checkpoints").glob("step-000000006-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)
    process.wait()
    assert not (tmp_path / "tiny" / "report.json").exists()
    assert "resuming in phase" in train(*arguments, launcher=True)
    by_step = losses_by_step(tmp_path / "tiny")
    assert sorted(by_step) == list(range(1, 21))
    resumed, uninterrupted = [by_step[step] for step in range(1, 21)], losses(finished[0])
    assert resumed == uninterrupted if stage == 0 else np.allclose(resumed, uninterrupted, rtol=1e-3)


@pytest.mark.long
def test_sampled_negatives_and_masked_rows_train(tiny_shards: Path, tmp_path: Path):
    phases = """  sampled: {kind: contrastive, epochs: 2, num_negatives: 16, soft_targets: none}
  masked: {kind: contrastive, epochs: 1, mask_uninitialized: true, category_memory_weight: 1,
           correspondence_estimator: scc, refinement_warmup_epochs: 0, matching_reference_size: 4}
"""
    text = TINY.replace("  contrastive: {kind: contrastive, epochs: 3}\n", phases)
    output = train(
        tiny_config(tmp_path, text),
        f"data.root={tiny_shards}",
        f"run.root={tmp_path}",
        "memory_bank.replicate_below_mib=0",
        "model.learnable_temperature=true",
        "deepspeed.zero_stage=3",
        ranks=2,
    )
    curve = losses(tmp_path / "tiny")
    assert "of wrong labels fixed" in output and len(curve) == 20 and np.isfinite(curve).all()


@pytest.mark.long
def test_gradient_accumulation_trains(tiny_shards: Path, tmp_path: Path):
    train(
        tiny_config(tmp_path),
        f"data.root={tiny_shards}",
        f"run.root={tmp_path}",
        "optim.gradient_accumulation_steps=2",
        ranks=2,
    )
    curve = losses(tmp_path / "tiny")
    assert len(curve) == 20 and np.isfinite(curve).all()


def test_corrupt_clips_are_quarantined_up_to_the_limit(tiny_shards: Path, tmp_path: Path):
    damaged = Path(shutil.copytree(tiny_shards, tmp_path / "damaged"))
    split = ShardedDataset.open(damaged).split("train")
    content = bytearray(split.shards[0].read_bytes())
    for sample in (3, 11):
        content[int(split.columns["video_offset"][sample]) + 300] ^= 1
    split.shards[0].write_bytes(content)
    arguments = (tiny_config(tmp_path), f"data.root={damaged}")
    output = train(*arguments, f"run.root={tmp_path}", "data.max_quarantined_fraction=0.05", ranks=2)
    assert "Quarantine: 2 clips" in output
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert [sample["id"] for sample in report["quarantined_samples"]] == [3, 11]
    assert all("CRC-32" in sample["reason"] for sample in report["quarantined_samples"])
    output = train(*arguments, f"run.root={tmp_path}", "run.name=strict", status=1)
    assert "data.max_quarantined_fraction=0.01" in output and "train-0000000" in output


def test_invalid_batch_size_ends_the_run_with_one_line(tiny_shards: Path, tmp_path: Path):
    arguments = (tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}", "optim.global_batch=25")
    output = train(*arguments, ranks=2, status=1)
    assert "optim.global_batch=25 cannot be divided among 2 ranks" in output and "Traceback" not in output


def test_print_config_shows_every_setting(tmp_path: Path):
    output = train(tiny_config(tmp_path), "--print-config", "optim.lr=0.25")
    assert "lr: 0.25" in output and "soft_targets: cycle" in output
