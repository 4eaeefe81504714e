"""Shipped recipes, at a fraction of their size."""

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.config.loading import load
from distav.data.annotations.labels import load_labels
from distav.data.annotations.teacher_scores import metadata_file, score_file, score_metadata, write_scores
from distav.data.data_module import DataModule
from distav.data.dataset import ShardedDataset
from distav.evaluation.metrics import NOISE_KINDS
from tests.helpers.launch import ROOT, TINY, read_metrics, tiny_config, train
from tests.helpers.rank_group import RankGroup, fingerprint, run_to_completion

SMALL = (
    "run.device=cpu", "run.log_every=1", "data.num_frames=2", "data.frame_stride=2", "data.frame_size=16",
    "data.audio_s=0.5", "model.embed_dim=16", "model.hidden_dim=32", "model.visual.width=8", "model.audio.width=8",
    "optim.global_batch=24", "phases.contrastive.epochs=3", "phases.probe.epochs=1",
)  # fmt: skip
AVID = ("correspondence_estimator=none", "soft_targets=none", "num_negatives=32", "nce=true")
TRAIN_CLIPS = 96
STEPS_PER_EPOCH = TRAIN_CLIPS // 24


@pytest.mark.parametrize(
    ("changes", "ranks"), [((), 1), (AVID, 2)], ids=["Robust-xID on one rank", "AVID on two ranks"]
)
def test_ravid_yaml(changes: tuple[str, ...], ranks: int, tiny_shards: Path, tmp_path: Path):
    overrides = [f"phases.contrastive.{change}" for change in changes]
    train(ROOT / "configs" / "ravid.yaml", f"data.root={tiny_shards}", f"run.root={tmp_path}", *SMALL, *overrides,
          ranks=ranks)  # fmt: skip
    run = tmp_path / "ravid"
    steps = [record for record in read_metrics(run) if record.get("phase") == "contrastive"]
    assert len(steps) == 3 * STEPS_PER_EPOCH
    for record in steps:
        assert record["train/loss"] == pytest.approx(record["train/instance"], rel=1e-6)
    report = json.loads((run / "report.json").read_text())
    assert [phase["name"] for phase in report["phases"]] == ["contrastive", "probe"]
    assert report["phases"][1]["steps"] == STEPS_PER_EPOCH and 0 <= report["test"]["top1"] <= 1
    weights = [
        record["correspondence/weight_mean"] for record in read_metrics(run) if "correspondence/weight_mean" in record
    ]
    # RAVID's weights from the CDF are 0.25 + 0.75 / 2 on average, for any noise rate.
    assert weights[-1] == (pytest.approx(1) if changes else pytest.approx(0.625, abs=0.08))


PIECES = ("piece_1", "piece_2", "piece_3")
SAMPLED = ("negatives_source=memory_bank", "num_negatives=15")


def crcl_arguments(folder: Path, shards: Path, *changes: str) -> list[str]:
    small = [override for override in SMALL if not override.startswith("phases.contrastive")]
    phases = [f"phases.{piece}.{change}" for piece in PIECES for change in ("epochs=3", *changes)]
    paths = (f"data.root={shards}", f"run.root={folder}", "monitor.media_clips=0", "run.checkpoint_every=1")
    return ["--config", str(ROOT / "configs" / "crcl.yaml"), *paths, *small, *phases]


def last_saved_step(run: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize(
    ("changes", "killed"),
    [((), [1]), ((), [0, 2]), (SAMPLED, [0, 1, 2])],
    ids=["batch, second piece", "batch, first and last", "sampled, all"],
)
@pytest.mark.long
def test_crcl_yaml_resumes_in_the_middle_of_a_piece(
    changes: tuple[str, ...], killed: list[int], tiny_shards: Path, tmp_path: Path
):
    complete, interrupted = tmp_path / "complete", tmp_path / "interrupted"
    run_to_completion(2, crcl_arguments(complete, tiny_shards, *changes), complete / "logs")
    for piece in killed:
        group = RankGroup(2, crcl_arguments(interrupted, tiny_shards, *changes), interrupted / f"logs-{piece}")
        kill_at = 3 * STEPS_PER_EPOCH * piece + 5 + piece
        group.wait_for(lambda at=kill_at: last_saved_step(interrupted / "crcl") >= at)
        group.signal(signal.SIGKILL, piece % 2)
        assert group.wait(60) != [0, 0]
    run_to_completion(2, crcl_arguments(interrupted, tiny_shards, *changes), interrupted / "logs")
    assert fingerprint(interrupted / "crcl") == fingerprint(complete / "crcl")
    report = json.loads((complete / "crcl" / "report.json").read_text())
    summaries = report["correspondence"]
    assert [summary["phase"] for summary in summaries] == list(PIECES)
    assert sum(sum(row) for row in summaries[-1]["confusion"]["counts"]) == TRAIN_CLIPS
    assert 0 <= summaries[-1]["auroc_correspondence"] <= 1 and report["test"]["rsum"] > 0
    means = {record["step"]: record["correspondence/correspondence_mean"] for record in read_metrics(complete / "crcl")
             if "correspondence/correspondence_mean" in record}  # fmt: skip
    epochs = [means[epoch * STEPS_PER_EPOCH] for epoch in range(1, 7)]
    # All pairs are trusted up to the end of the first warm-up; reinitialization keeps the correspondences.
    assert epochs[0] == 1 > epochs[1] > 0
    assert epochs[2] == epochs[3] == epochs[4] != epochs[5]


def test_one_run_corrects_labels_and_pairs(tiny_shards: Path, tmp_path: Path):
    acl = "loss: acl, negatives_source: batch, soft_targets: none"
    scc = "correspondence_estimator: scc, refinement_warmup_epochs: 1, matching_reference_size: 4"
    text = TINY.replace("contrastive, epochs: 3", f"contrastive, epochs: 3, {acl}, {scc}")
    train(tiny_config(tmp_path, text), f"data.root={tiny_shards}", f"run.root={tmp_path}")
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    confusion = report["corrections"][0]["noise_confusion"]
    assert confusion["kinds"] == NOISE_KINDS
    counts = np.array(confusion["counts"])
    assert counts.sum() == TRAIN_CLIPS
    assert counts[1].sum() + counts[3].sum() == TRAIN_CLIPS // 4  # Wrong labels of the dataset.
    assert 0 <= report["correspondence"][0]["auroc_correspondence"] <= 1


def test_teachers_vote_in_the_correction(tiny_shards: Path, tmp_path: Path):
    shards = ShardedDataset.open(tiny_shards)
    split, classes = shards.split("train"), shards.classes
    true = load_labels(shards, split).true
    assert true is not None
    rng = np.random.default_rng(0)
    # Scores that are independent of the given labels and correct for most clips.
    logits = 4.0 * np.eye(len(classes))[true][:, None]
    visual, audio = ((logits + 1.5 * rng.normal(size=logits.shape)).astype(np.float32) for _ in range(2))
    teachers = {modality: ("none", classes, classes) for modality in ("audio", "visual")}
    scores = tmp_path / "scores"
    metadata_file(scores).parent.mkdir(parents=True)
    metadata_file(scores).write_text(json.dumps(score_metadata(shards, teachers)))
    write_scores(score_file(scores, "train", 0), audio, visual)
    train(tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}", "phases.hybrid.epochs=1",
          f"phases.correction.pseudo_labels={scores}")  # fmt: skip
    correction = json.loads((tmp_path / "tiny" / "report.json").read_text())["corrections"][0]
    # Without teachers the votes carry no label signal here, and the accuracy would stay at 0.75.
    assert correction["label_accuracy"]["corrected"] > 0.85


def test_scores_of_another_dataset_are_refused(tiny_shards: Path, tmp_path: Path):
    shards = ShardedDataset.open(tiny_shards)
    scores, other = tmp_path / "scores", tmp_path / "other"
    metadata_file(scores).parent.mkdir(parents=True)
    teachers = {modality: ("none", shards.classes, shards.classes) for modality in ("audio", "visual")}
    metadata_file(scores).write_text(json.dumps(score_metadata(shards, teachers)))
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    other.mkdir()
    for path in tiny_shards.iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    (other / "manifest.json").write_text(json.dumps(manifest | {"rejected": 1}))
    config = load(tiny_config(tmp_path), [f"data.root={other}", f"phases.correction.pseudo_labels={scores}"])
    with pytest.raises(UserError, match="phases.correction.pseudo_labels=.*contains scores of a dataset other than"):
        DataModule.open(config)


WITHOUT_SIGNAL = """
phases:
  correct_1: {kind: label_correction, num_neighbors: [6, 12], second_round_neighbors: [0, 6]}
  learn_1: {kind: supervised, epochs: 2, targets: held_out}
  correct_2: {kind: label_correction, num_neighbors: [6, 12], second_round_neighbors: [0, 6]}
  learn_2: {kind: supervised, epochs: 1, targets: posterior}
"""


def test_random_labels_are_kept_also_after_training_on_them(tiny_shards: Path, tmp_path: Path):
    shards = ShardedDataset.open(tiny_shards)
    random = np.random.default_rng(3).choice(shards.classes, TRAIN_CLIPS)
    pq.write_table(pa.table({"id": np.arange(TRAIN_CLIPS), "label": random}), tmp_path / "random.parquet")
    config = tiny_config(tmp_path, TINY.split("phases:")[0] + WITHOUT_SIGNAL)
    output = train(
        config, f"data.root={tiny_shards}", f"run.root={tmp_path}", f"data.label_overrides={tmp_path}/random.parquet"
    )
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    for correction in report["corrections"]:
        assert correction["changed_fraction"] == 0 and not correction["label_noise_rate_by_class"]
        rate = correction["label_noise_rate"]
        assert rate["ci95_high"] - rate["ci95_low"] > 0.3
    assert report["corrections"][1]["log_likelihood_gain"] == 0
    assert output.count("k-NN votes carry no label signal (log-likelihood gain ") == 1
    assert output.count("keeps the given labels: a phase trained on them after a correction without label signal") == 1
    assert "not estimated: k-NN votes carry no label signal" in output
    assert [phase["steps"] for phase in report["phases"]] == [0, 2 * STEPS_PER_EPOCH, 0, STEPS_PER_EPOCH]
