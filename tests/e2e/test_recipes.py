"""The recipes that are shipped, at a fraction of their size."""

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
from distav.data.annotations.teacher_scores import metadata_file, manifest_digest, score_file, write_scores
from distav.data.data_module import DataModule
from distav.data.dataset import ShardedDataset
from tests.helpers.launch import ROOT, TINY, records, tiny_config, train
from tests.helpers.team import Team, fingerprint, run_whole

SMALL = (
    "run.device=cpu", "run.log_every=1", "data.num_frames=2", "data.frame_stride=2", "data.frame_size=16",
    "data.audio_s=0.5", "model.embed_dim=16", "model.hidden_dim=32", "model.visual.width=8", "model.audio.width=8",
    "optim.global_batch=24", "phases.contrastive.epochs=3", "phases.probe.epochs=1",
)  # fmt: skip
AVID = ("correspondence_estimator=none", "soft_targets=none", "num_negatives=32", "nce=true")
TRAIN_CLIPS = 96


@pytest.mark.parametrize(
    ("changes", "ranks"), [((), 1), (AVID, 2)], ids=["Robust-xID on one rank", "AVID on two ranks"]
)
def test_ravid_yaml(changes: tuple[str, ...], ranks: int, tiny_shards: Path, tmp_path: Path):
    overrides = [f"phases.contrastive.{change}" for change in changes]
    train(ROOT / "configs" / "ravid.yaml", f"data.root={tiny_shards}", f"run.root={tmp_path}", *SMALL, *overrides,
          ranks=ranks)  # fmt: skip
    run = tmp_path / "ravid"
    steps = [each for each in records(run) if each.get("phase") == "contrastive"]
    assert len(steps) == 3 * TRAIN_CLIPS // 24
    for each in steps:
        assert each["train/loss"] == pytest.approx(each["train/instance"], rel=1e-6)
    report = json.loads((run / "report.json").read_text())
    assert [each["name"] for each in report["phases"]] == ["contrastive", "probe"]
    assert report["phases"][1]["steps"] == TRAIN_CLIPS // 24 and 0 <= report["test"]["top1"] <= 1
    weight = [each["correspondence/weight_mean"] for each in records(run) if "correspondence/weight_mean" in each][-1]
    # RAVID's weights by the cdf: 0.25 + 0.75 / 2 on average, whatever the noise.
    assert weight == (pytest.approx(1) if changes else pytest.approx(0.625, abs=0.08))


PIECES = ("piece_1", "piece_2", "piece_3")


def crcl(folder: Path, shards: Path, *changes: str) -> list[str]:
    small = [each for each in SMALL if not each.startswith("phases.contrastive")]
    each = [f"phases.{piece}.{change}" for piece in PIECES for change in ("epochs=3", *changes)]
    where = (f"data.root={shards}", f"run.root={folder}", "monitor.media_clips=0", "run.checkpoint_every=1")
    return ["--config", str(ROOT / "configs" / "crcl.yaml"), *where, *small, *each]


def steps_saved(run: Path) -> int:
    return max((int(each.name.split("-")[1]) for each in (run / "checkpoints").glob("step-*")), default=0)


BANK = ("negatives_source=memory_bank", "num_negatives=15")


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("changes", "killed"),
    [((), [1]), pytest.param((), [0, 2], marks=LONG), pytest.param(BANK, [0, 1, 2], marks=LONG)],
    ids=["batch, second piece", "batch, first and last", "bank, all"],
)
@pytest.mark.long
def test_crcl_yaml_goes_on_in_the_middle_of_a_piece(
    changes: tuple[str, ...], killed: list[int], tiny_shards: Path, tmp_path: Path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_whole(2, crcl(whole, tiny_shards, *changes), whole / "logs")
    for piece in killed:
        team = Team(2, crcl(broken, tiny_shards, *changes), broken / f"logs-{piece}")
        reached = 3 * TRAIN_CLIPS // 24 * piece + 5 + piece
        team.wait_for(lambda at=reached: steps_saved(broken / "crcl") >= at)
        team.signal(signal.SIGKILL, piece % 2)
        assert team.end(60) != [0, 0]
    run_whole(2, crcl(broken, tiny_shards, *changes), broken / "logs")
    assert fingerprint(broken / "crcl") == fingerprint(whole / "crcl")
    report = json.loads((whole / "crcl" / "report.json").read_text())
    told = report["correspondence"]
    assert [each["phase"] for each in told] == list(PIECES)
    assert sum(sum(row) for row in told[-1]["confusion"]["counts"]) == TRAIN_CLIPS
    assert 0 <= told[-1]["auroc_correspondence"] <= 1 and report["test"]["rsum"] > 0
    believed = {each["step"]: each["correspondence/correspondence_mean"] for each in records(whole / "crcl")
                if "correspondence/correspondence_mean" in each}  # fmt: skip
    per_epoch = TRAIN_CLIPS // 24
    # All pairs are believed up to the end of the first warm-up, and a restart changes nothing about them.
    assert believed[per_epoch] == 1 > believed[2 * per_epoch] > 0
    assert believed[3 * per_epoch] == believed[4 * per_epoch] == believed[5 * per_epoch] != believed[6 * per_epoch]


def test_labels_and_pairs_are_corrected_in_one_run(tiny_shards: Path, tmp_path: Path):
    acl = "loss: acl, negatives_source: batch, soft_targets: none"
    scc = "correspondence_estimator: scc, refinement_warmup_epochs: 1, matching_reference_size: 4"
    text = TINY.replace("contrastive, epochs: 3", f"contrastive, epochs: 3, {acl}, {scc}")
    train(tiny_config(tmp_path, text), f"data.root={tiny_shards}", f"run.root={tmp_path}")
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    found = report["corrections"][0]["noise_confusion"]
    assert found["kinds"] == ["right", "wrong label", "wrong pair", "both wrong"]
    assert np.sum(found["counts"]) == TRAIN_CLIPS
    assert np.sum(found["counts"][1]) + np.sum(found["counts"][3]) == TRAIN_CLIPS // 4  # wrong labels of the set
    assert 0 <= report["correspondence"][0]["auroc_correspondence"] <= 1


WITHOUT_SIGNAL = """
phases:
  correct_1: {kind: label_correction, num_neighbors: [6, 12], second_round_neighbors: [0, 6]}
  learn_1: {kind: supervised, epochs: 2, targets: held_out}
  correct_2: {kind: label_correction, num_neighbors: [6, 12], second_round_neighbors: [0, 6]}
  learn_2: {kind: supervised, epochs: 1, targets: posterior}
"""


def test_teachers_have_a_vote_in_the_correction(tiny_shards: Path, tmp_path: Path):
    shards = ShardedDataset.open(tiny_shards)
    split, classes = shards.split("train"), shards.classes
    true = load_labels(shards, split).true
    assert true is not None
    rng = np.random.default_rng(0)
    # Teachers that are right for most clips, know how sure they are, and were never shown a label.
    shown = 4.0 * np.eye(len(classes))[true][:, None]
    seen, heard = ((shown + 1.5 * rng.normal(size=shown.shape)).astype(np.float32) for _ in range(2))
    asked = {modality: ["none", classes, classes] for modality in ("audio", "visual")}
    metadata_file(tmp_path / "said").parent.mkdir(parents=True)
    metadata_file(tmp_path / "said").write_text(json.dumps({"set": manifest_digest(shards), "asked": asked}))
    write_scores(score_file(tmp_path / "said", "train", 0), heard, seen)
    train(tiny_config(tmp_path), f"data.root={tiny_shards}", f"run.root={tmp_path}", "phases.hybrid.epochs=1",
          f"phases.correction.pseudo_labels={tmp_path}/said")  # fmt: skip
    told = json.loads((tmp_path / "tiny" / "report.json").read_text())["corrections"][0]
    # Neighbours alone know nothing here, and the labels would stay right for three of four.
    assert told["label_accuracy"]["corrected"] > 0.85 and "teacher of pictures" in told["selected_votes"]["pooled"]
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    (tmp_path / "other").mkdir()
    for path in tiny_shards.iterdir():
        (tmp_path / "other" / path.name).symlink_to(path)
    (tmp_path / "other" / "manifest.json").unlink()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"rejected": 1}))
    with pytest.raises(UserError, match="phases.correction.pseudo_labels=.*holds scores of another set"):
        DataModule.open(load(tiny_config(tmp_path), [f"data.root={tmp_path}/other",
                                               f"phases.correction.pseudo_labels={tmp_path}/said"]))  # fmt: skip


def test_labels_that_votes_cannot_tell_stay_and_are_not_judged_by_what_learnt_them(tiny_shards: Path, tmp_path: Path):
    shards = ShardedDataset.open(tiny_shards)
    drawn = np.random.default_rng(3).choice(shards.classes, TRAIN_CLIPS)
    pq.write_table(pa.table({"id": np.arange(TRAIN_CLIPS), "label": drawn}), tmp_path / "random.parquet")
    config = tiny_config(tmp_path, TINY.split("phases:")[0] + WITHOUT_SIGNAL)
    said = train(
        config, f"data.root={tiny_shards}", f"run.root={tmp_path}", f"data.label_overrides={tmp_path}/random.parquet"
    )
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    for found in report["corrections"]:
        assert found["changed_fraction"] == 0 and not found["label_noise_rate_by_class"]
        assert found["label_noise_rate"]["ci95_high"] - found["label_noise_rate"]["ci95_low"] > 0.3
    assert report["corrections"][1]["log_likelihood_gain"] == 0
    assert said.count("neighbours say nothing of the labels (") == 2 and "Noise:   not known" in said
    assert [each["steps"] for each in report["phases"]] == [0, 8, 0, 4]
