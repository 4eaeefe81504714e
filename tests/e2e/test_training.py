"""The whole main job on tiny shards, started by the deepspeed launcher."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
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
from tests.helpers.launch import ROOT, TINY, command, environment, losses, records, tiny_config, train


def test_the_report_has_what_was_promised(finished: tuple[Path, str], tiny_shards: Path):
    run, said = finished
    report = json.loads((run / "report.json").read_text())
    assert report["samples"] == 96 and report["quarantined_samples"] == []
    assert [(each["name"], each["kind"], each["steps"]) for each in report["phases"]] == [
        ("contrastive", "contrastive", 12),
        ("correction", "label_correction", 0),
        ("hybrid", "supervised", 8),
    ]
    assert all(each["seconds"] > 0 and each["clips_per_s"] > 0 for each in report["phases"])
    assert report["label_accuracy"].keys() == {"given", "corrected", "wrong_labels_fixed", "right_labels_broken",
                                               "ece_held_out", "ece_posterior"}  # fmt: skip
    found = report["corrections"][0]
    assert found["phase"] == "correction" and found["label_noise_rate"].keys() == {"estimate", "ci95_low", "ci95_high"}
    assert found["label_noise_rate_by_class"].keys() in (set(ShardedDataset.open(tiny_shards).classes), set())
    assert (
        0
        <= found["pair_mismatch_rate"]["ci95_low"]
        <= found["pair_mismatch_rate"]["estimate"]
        <= found["pair_mismatch_rate"]["ci95_high"]
        <= 1
    )
    assert report["label_accuracy"]["given"] == 0.75
    assert 0 <= report["correspondence_auroc"] <= 1
    recalls = {f"{direction}_recall@{k}" for direction in ("v2a", "a2v") for k in (1, 5, 10)}
    assert report["test"].keys() == {"top1", "top1_visual", "top1_audio", "v2a_map", "a2v_map", "rsum"} | recalls
    assert "of wrong labels fixed" in said and "Test:" in said


def test_the_run_folder_has_what_was_promised(finished: tuple[Path, str], tiny_shards: Path):
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
    truth = pq.read_table(tiny_shards / "labels.parquet", filters=[("split", "=", "train")]).column("true_label")
    right = np.mean(
        [a == b for a, b in zip(table.column("corrected_label").to_pylist(), truth.to_pylist(), strict=True)]
    )
    assert right == pytest.approx(accuracy)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "audio": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/grad_norm", "time/clips_per_s", "time/data_wait_pct", "memory/peak_gib",
            "test/top1"} <= set(tags["scalars"])  # fmt: skip
    assert {"correspondence/similarity", "correspondence/weight", "labels/confidence"} <= set(tags["histograms"])
    assert {"input/frames", "input/spectrogram", "labels/given_vs_corrected"} <= set(tags["images"])
    assert "input/audio_0" in tags["audio"]
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    environment_facts = json.loads((run / "environment.json").read_text())
    assert environment_facts["versions"]["torch"].startswith("2.11")


def test_exported_encoders_give_what_the_run_gave(finished: tuple[Path, str], tiny_shards: Path):
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
    truth = pq.read_table(tiny_shards / "labels.parquet", filters=[("split", "=", "test")]).column("label").to_pylist()
    top1 = np.mean(
        [description["classes"][guess] == label for guess, label in zip(logits.argmax(1), truth, strict=True)]
    )
    assert top1 == pytest.approx(json.loads((run / "report.json").read_text())["test"]["top1"])


def test_a_finished_run_is_told_and_not_repeated(finished: tuple[Path, str], tiny_shards: Path):
    run, _ = finished
    before = len(losses(run))
    said = train(run.parent / "tiny.yaml", f"data.root={tiny_shards}", f"run.root={run.parent}")
    assert "Done: 96 training clips" in said and len(losses(run)) == before
    said = train(
        run.parent / "tiny.yaml", f"data.root={tiny_shards}", f"run.root={run.parent}", "optim.lr=0.5", status=1
    )
    assert "other settings" in said and "requested: optim.lr=0.5" in said


def test_a_setting_that_is_newer_than_the_run_was_what_it_is_by_default():
    now = to_yaml(load(ROOT / "configs" / "quickstart.yaml"))
    older = "\n".join(line for line in now.splitlines() if "squash" not in line and "harvested" not in line)
    assert older != now and _first_difference(older, now) == ""
    assert "data.squash=False, requested: data.squash=True" in _first_difference(
        older, now.replace("squash: false", "squash: true")
    )
    fewer = "\n".join(now.split("phases:")[:1]) + "phases: {}\n"
    assert _first_difference(fewer, now) != ""


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 2, 3))])
def test_two_ranks_at_any_zero_stage_learn_as_one(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, stage: int
):
    run, _ = finished
    train(
        tiny_config(tmp_path),
        f"data.root={tiny_shards}",
        f"run.root={tmp_path}",
        f"deepspeed.zero_stage={stage}",
        # Small tensors stay whole at stage 3 unless told not to.
        *(["deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"] if stage == 3 else []),
        f"model.activation_checkpointing={stage == 3}",
        ranks=2,
    )
    alone, together = losses(run), losses(tmp_path / "tiny")
    assert len(alone) == len(together) == 20
    # Another order of sums differs in the last bits, which later steps multiply.
    np.testing.assert_allclose(together[:12], alone[:12], rtol=1e-4 if stage == 0 else 1e-3)
    np.testing.assert_allclose(together[12:], alone[12:], rtol=1e-3)
    tables = [pq.read_table(each / "labels" / "correction.parquet") for each in (run, tmp_path / "tiny")]
    same = np.mean(
        [a == b for a, b in zip(*(each.column("corrected_label").to_pylist() for each in tables), strict=True)]
    )
    assert same > 0.95


@pytest.mark.long  # Engines in bfloat16 at every stage, and a parsing run at 3, are tried each time.
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_in_bf16_follows_that_in_fp32(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, stage: int
):
    arguments = (tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}")
    train(*arguments, "deepspeed.precision=bf16", f"deepspeed.zero_stage={stage}", ranks=2)
    low, full = losses(tmp_path / "tiny"), losses(finished[0])
    for phase in (slice(0, 12), slice(12, 20)):  # Means, since stage 3 draws other initial weights in bfloat16.
        assert np.mean(low[phase]) == pytest.approx(np.mean(full[phase]), rel=0.04)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
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
    said = train(*arguments, launcher=True)
    assert "resuming in phase" in said
    by_step = {each["step"]: each["train/loss"] for each in records(tmp_path / "tiny") if "train/loss" in each}
    assert sorted(by_step) == list(range(1, 21))
    again, unbroken = [by_step[step] for step in range(1, 21)], losses(finished[0])
    assert again == unbroken if stage == 0 else np.allclose(again, unbroken, rtol=1e-3)


@pytest.mark.long
def test_other_ways_to_use_the_bank_train(tiny_shards: Path, tmp_path: Path):
    phases = """  drawn: {kind: contrastive, epochs: 2, num_negatives: 16, soft_targets: none}
  masked: {kind: contrastive, epochs: 1, mask_uninitialized: true, category_memory_weight: 1, correspondence_estimator: scc,
           refinement_warmup_epochs: 0, matching_reference_size: 4}
"""
    text = TINY.replace("  contrastive: {kind: contrastive, epochs: 3}\n", phases)
    said = train(
        tiny_config(tmp_path, text),
        f"data.root={tiny_shards}",
        f"run.root={tmp_path}",
        "memory_bank.replicate_below_mib=0",
        "model.learnable_temperature=true",
        "deepspeed.zero_stage=3",
        ranks=2,
    )
    found = losses(tmp_path / "tiny")
    assert "of wrong labels fixed" in said and len(found) == 20 and np.isfinite(found).all()


@pytest.mark.long
def test_accumulated_micro_batches_train(tiny_shards: Path, tmp_path: Path):
    train(
        tiny_config(tmp_path),
        f"data.root={tiny_shards}",
        f"run.root={tmp_path}",
        "optim.gradient_accumulation_steps=2",
        ranks=2,
    )
    found = losses(tmp_path / "tiny")
    assert len(found) == 20 and np.isfinite(found).all()


def test_bad_clips_are_skipped_and_named_up_to_the_budget(tiny_shards: Path, tmp_path: Path):
    import shutil

    damaged = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    split = ShardedDataset.open(damaged).split("train")
    content = bytearray(split.shards[0].read_bytes())
    for sample in (3, 11):
        content[int(split.columns["video_offset"][sample]) + 300] ^= 1
    split.shards[0].write_bytes(content)
    arguments = (tiny_config(tmp_path), f"data.root={damaged}")
    train(*arguments, f"run.root={tmp_path}", "data.max_quarantined_fraction=0.05", ranks=2)
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert [each["id"] for each in report["quarantined_samples"]] == [3, 11]
    assert all("CRC-32" in each["reason"] for each in report["quarantined_samples"])
    said = train(*arguments, f"run.root={tmp_path}", "run.name=strict", status=1)
    assert "data.max_quarantined_fraction=0.01" in said and "train-0000000" in said


def test_impossible_settings_stop_the_launch_with_one_line(tiny_shards: Path, tmp_path: Path):
    arguments = (tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}", "optim.global_batch=25")
    said = train(*arguments, ranks=2, status=1)
    assert "optim.global_batch=25 cannot be divided among 2 ranks" in said and "Traceback" not in said


def test_print_config_shows_every_setting(tmp_path: Path):
    said = train(tiny_config(tmp_path), "--print-config", "optim.lr=0.25")
    assert "lr: 0.25" in said and "soft_targets: cycle" in said
