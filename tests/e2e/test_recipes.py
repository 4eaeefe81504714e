"""The recipes that are shipped, at a fraction of their size."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.data.format import ShardSet
from tests.helpers.launch import ROOT, TINY, records, tiny_config, train

SMALL = (
    "run.device=cpu", "run.log_every=1", "data.num_frames=2", "data.frame_stride=2", "data.frame_size=16",
    "data.audio_s=0.5", "model.embed_dim=16", "model.hidden_dim=32", "model.visual.width=8", "model.audio.width=8",
    "optim.global_batch=24", "phases.contrastive.epochs=3", "phases.probe.epochs=1",
)  # fmt: skip
AVID = ("estimator=none", "soft_targets=none", "negatives=32", "nce=true")
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
    weight = [each["pairs/weight_mean"] for each in records(run) if "pairs/weight_mean" in each][-1]
    # RAVID's weights by the cdf: 0.25 + 0.75 / 2 on average, whatever the noise.
    assert weight == (pytest.approx(1) if changes else pytest.approx(0.625, abs=0.08))


WITHOUT_SIGNAL = """
phases:
  correct_1: {kind: correction, neighbors: [6, 12], second: [0, 6]}
  learn_1: {kind: supervised, epochs: 2, targets: held_out}
  correct_2: {kind: correction, neighbors: [6, 12], second: [0, 6]}
  learn_2: {kind: supervised, epochs: 1, targets: posterior}
"""


def test_labels_that_votes_cannot_tell_stay_and_are_not_judged_by_what_learnt_them(tiny_shards: Path, tmp_path: Path):
    shards = ShardSet.open(tiny_shards)
    drawn = np.random.default_rng(3).choice(shards.classes, TRAIN_CLIPS)
    pq.write_table(pa.table({"id": np.arange(TRAIN_CLIPS), "label": drawn}), tmp_path / "random.parquet")
    config = tiny_config(tmp_path, TINY.split("phases:")[0] + WITHOUT_SIGNAL)
    said = train(config, f"data.root={tiny_shards}", f"run.root={tmp_path}", f"data.labels={tmp_path}/random.parquet")
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    for found in report["corrections"]:
        assert found["changed"] == 0 and not found["label_noise_by_class"]
        assert found["label_noise"]["high"] - found["label_noise"]["low"] > 0.3
    assert report["corrections"][1]["signal_nats"] == 0
    assert said.count("neighbours say nothing of the labels (") == 2 and "Noise:   not known" in said
    assert [each["steps"] for each in report["phases"]] == [0, 8, 0, 4]
