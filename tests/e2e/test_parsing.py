"""Event parsing from features and from clips, with the configurations of the project."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distav.config.errors import UserError
from distav.config.loading import load
from distav.config.schema import DataConfig
from distav.data.annotations.events import events_table, load_events
from distav.data.data_module import DataModule
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from distav.evaluation.event_metrics import event_metrics
from distav.models.pretrained import load_encoders, load_parser
from tests.helpers.events import AVE_CLASSES, ave_shards, llp_shards, write_ave, write_llp
from tests.helpers.launch import ROOT, losses, train
from tests.helpers.rank_group import RankGroup, fingerprint, run_to_completion

SMALL = (
    "run.device=cpu", "run.log_every=1", "optim.global_batch=16", "optim.lr=5e-3", "model.parser.width=32",
    "model.parser.heads=2", "model.parser.ffn_dim=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def llp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of features, with the true events as pseudo-labels."""
    folder = tmp_path_factory.mktemp("llp")
    truth = write_llp(folder / "raw")
    llp_shards(folder / "raw", folder / "shards")
    shards = ShardedDataset.open(folder / "shards")
    split = shards.split("train")
    events = np.stack([truth[source] for source in split.sources])
    pq.write_table(events_table("train", split.keys, split.sources, shards.classes, events), folder / "events.parquet")
    return folder


def arguments(recipe: str, shards: Path, out: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs" / f"{recipe}.yaml")
    return ["--config", config, f"data.root={shards}", f"run.root={out}", *SMALL, *more]


def valor(llp: Path, out: Path, *more: str) -> list[str]:
    table = f"phases.parse.pseudo_labels={llp}/events.parquet"
    return arguments("valor", llp / "shards", out, table, "phases.parse.epochs=30", *more)


@pytest.mark.long
def test_one_and_two_ranks_learn_the_same_and_a_kill_changes_nothing(llp: Path, tmp_path: Path):
    run_to_completion(1, valor(llp, tmp_path / "one"), tmp_path / "one" / "logs")
    run_to_completion(2, valor(llp, tmp_path / "two"), tmp_path / "two" / "logs")
    one, two = (losses(tmp_path / name / "valor") for name in ("one", "two"))
    assert len(one) == 90 and np.allclose(one, two, rtol=1e-3)
    assert one[-1] < one[0] / 4
    report = json.loads((tmp_path / "two" / "valor" / "report.json").read_text())
    assert report["events"]["segment"]["type"] > 60 and "test" not in report

    group = RankGroup(2, valor(llp, tmp_path / "broken", "run.checkpoint_every=1"), tmp_path / "broken" / "first")
    group.wait_for(lambda: len(list((tmp_path / "broken" / "valor" / "checkpoints").glob("step-*"))) >= 2)
    group.signal(signal.SIGKILL, 1)
    assert group.wait(60) != [0, 0]
    run_to_completion(2, valor(llp, tmp_path / "broken", "run.checkpoint_every=1"), tmp_path / "broken" / "logs")
    assert fingerprint(tmp_path / "broken" / "valor") == fingerprint(tmp_path / "two" / "valor")

    model, description = load_parser(tmp_path / "one" / "valor" / "export")
    shards = ShardedDataset.open(llp / "shards")
    loader = Loader(shards.split("test"), DataConfig(), None, 0, 12, torch.device("cpu"))
    batch = loader.load(np.arange(12), 0)
    with torch.no_grad():
        parsed = model(batch.seeds, **batch.media)
    predicted = (parsed["segments"].sigmoid() >= 0.5) & (parsed["video"] >= 0.5)[:, None, None]
    known = load_events(shards, shards.split("test")).events
    assert known is not None and description["classes"] == shards.classes
    reported = json.loads((tmp_path / "one" / "valor" / "report.json").read_text())["events"]
    for level, scores in event_metrics(predicted.numpy(), known).items():
        assert scores == pytest.approx(reported[level])
    with pytest.raises(UserError, match="use load_parser"):
        load_encoders(tmp_path / "one" / "valor" / "export")


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("han", ()),
        (
            "valor_plus",
            ("phases.parse.pseudo_labels={}/events.parquet", "deepspeed.zero_stage=3", "deepspeed.precision=bf16"),
        ),
        (
            "valor_plus_plus",
            (
                "phases.parse.pseudo_labels={}/events.parquet",
                "~model.parser.token_grids.clap",
                "+model.parser.token_grids.vggish=[2,5]",
            ),
        ),
    ],
)
def test_the_other_recipes_learn(recipe: str, changes: tuple[str, ...], llp: Path, tmp_path: Path):
    overrides = [change.replace("{}", str(llp)) for change in changes]
    epochs = "phases.parse.epochs=6"
    run_to_completion(1, arguments(recipe, llp / "shards", tmp_path, epochs, *overrides), tmp_path / "logs")
    curve = losses(tmp_path / recipe)
    assert len(curve) == 18 and curve[-1] < 0.7 * curve[0]
    assert set(json.loads((tmp_path / recipe / "report.json").read_text())["events"]) == {"segment", "event"}


CLIPS = """defaults: [schema, _self_]
run: {name: clips, device: cpu, log_every: 1}
data: {num_frames: 20, frame_stride: 4, frame_size: 16, audio_s: 10.0}
augment: {flip_prob: 0.0}
model:
  embed_dim: 16
  hidden_dim: 32
  visual: {width: 8}
  audio: {width: 8, num_mels: 32}
  parser: {width: 32, heads: 2, ffn_dim: 32}
optim: {global_batch: 8, lr: 3e-3}
monitor: {media_clips: 1}
phases:
  contrastive: {kind: contrastive, epochs: 2}
  parse: {kind: parsing, epochs: 3, modality_weight: 1.0}
"""


@pytest.fixture(scope="module")
def ave(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ave")
    write_ave(folder / "raw")
    ave_shards(folder / "raw", folder / "shards")
    (folder / "clips.yaml").write_text(CLIPS)
    return folder


def test_towers_learn_from_clips_end_to_end(ave: Path, tmp_path: Path):
    paths = f"data.root={ave}/shards", f"run.root={tmp_path}"
    output = train(ave / "clips.yaml", *paths, ranks=2)
    report = json.loads((tmp_path / "clips" / "report.json").read_text())
    assert 0 <= report["events"]["segment_accuracy"] <= 100 and report["test"]["rsum"] > 0
    assert "Events:     segment-level F1" in output
    model, description = load_encoders(tmp_path / "clips" / "export")
    assert description["segments"] == 10 and description["classes"] == [*AVE_CLASSES]
    with torch.no_grad():
        frames = torch.zeros(2, 20, 16, 16, 3, dtype=torch.uint8)
        parsed = model(frames, torch.zeros(2, 160000), torch.zeros(2, dtype=torch.int64), parse=True)
    assert parsed["segments"].shape == (2, 2, 10, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.audio_s=1.0",), "data.audio_s=1: event parsing needs the audio of the complete clip; set it to 10"),
        (("data.num_frames=8",), "data.num_frames=8 and data.frame_stride=4"),
        (("phases.parse.pseudo_labels=gone.parquet",), "phases.parse.pseudo_labels=gone.parquet: no such file"),
        (("model.parser.heads=3",), "model.parser.heads=3: allowed: a divisor of"),
    ],
)
def test_clips_that_do_not_cover_all_segments_are_refused(changes: tuple[str, ...], message: str, ave: Path):
    with pytest.raises(UserError, match=re.escape(message)):
        DataModule.open(load(ave / "clips.yaml", [f"data.root={ave}/shards", *changes]))


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("kind: contrastive", "phases.a.kind=contrastive: .* holds features; allowed: parsing"),
        ("kind: supervised, targets: given", "phases.a.kind=supervised: .* holds features; allowed: parsing"),
        ("kind: parsing", "model.parser.token_grids.clap: the dataset has no such feature stream"),
    ],
)
def test_phases_that_cannot_use_features_are_refused(phase: str, message: str, llp: Path, tmp_path: Path):
    model = "model: {parser: {token_grids: {clap: [2, 5]}}}"
    text = f"defaults: [schema, _self_]\n{model}\nphases: {{a: {{{phase}}}}}\n"
    (tmp_path / "any.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        DataModule.open(load(tmp_path / "any.yaml", [f"data.root={llp}/shards", "optim.global_batch=16"]))
