"""Components of another installed package: towers, a contrastive objective, a classification loss and a phase."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.helpers.launch import ROOT, environment, losses
from tests.helpers.rank_group import last_checkpoint

MODULE = """
import json
from dataclasses import dataclass, field

import torch
from torch import nn

from distav.config.bounds import at_least
from distav.config.errors import UserError
from distav.losses.classification import ClassificationLoss, soft_cross_entropy
from distav.losses.contrastive_objectives import ContrastiveObjective, PairLosses
from distav.losses.info_nce import InBatchNegatives
from distav.models.encoder import AudioEncoder, VisualEncoder


class MeanColor(VisualEncoder):
    def __init__(self, config, data):
        super().__init__(config, data)
        self.feature_dim = config.width
        self.colors = nn.Linear(3, config.width)

    def forward(self, clip):
        return self.colors(clip.mean((2, 3, 4)))


class MeanLevel(AudioEncoder):
    def __init__(self, config, num_frames):
        super().__init__(config, num_frames)
        self.feature_dim = config.width
        self.levels = nn.Linear(config.num_mels, config.width)

    def forward(self, mel):
        return self.levels(mel.mean((1, 3)))


def hinge(scores, own):
    index = own[:, None]
    return (1 + scores - scores.gather(1, index)).clamp_min(0).scatter(1, index, 0.0).mean(1)


class Hinge(ContrastiveObjective):
    @classmethod
    def validate(cls, config, key):
        if config.num_negatives:
            raise UserError(f"{key}.num_negatives={config.num_negatives}: hinge compares samples of the batch only")

    def __call__(self, pairs):
        correspondence = self.bank.fetch(("correspondence",), pairs.global_batch.ids)[0]
        negatives = InBatchNegatives(pairs.global_batch, pairs.visual, pairs.audio, pairs.temperature)
        return PairLosses(negatives.losses(hinge), correspondence)


class Smoothed(ClassificationLoss):
    def __init__(self, config, bank, num_heads, num_classes):
        super().__init__(config, bank, num_heads, num_classes)
        bank.register_column("smoothed_visits")

    def __call__(self, global_batch, logits, targets):
        visits = self.bank.fetch(("smoothed_visits",), global_batch.ids)[0] + 1
        self.bank.write("smoothed_visits", visits, global_batch.ids, global_batch.valid)
        return [soft_cross_entropy(head, 0.9 * target + 0.1 / self.num_classes)
                for head, target in zip(logits, targets, strict=True)]


@dataclass
class Summary:
    kind: str = "summary"
    digits: int = field(default=3, metadata=at_least(0))

    @staticmethod
    def run(run, name, config):
        mean = round(float(run.bank.pair_similarity().nanmean()), config.digits)
        (run.folder / f"{name}.json").write_text(json.dumps({"pair_similarity": mean}))


@dataclass
class Idle:
    kind: str = "idle"
"""
ENTRY_POINTS = """
[distav.visual_towers]
mean_color = another_package:MeanColor
[distav.audio_towers]
mean_level = another_package:MeanLevel
[distav.contrastive_objectives]
hinge = another_package:Hinge
[distav.classification_losses]
smoothed = another_package:Smoothed
removed = another_package:Removed
[distav.phases]
summary = another_package:Summary
idle = another_package:Idle
"""
CONFIG = """defaults: [schema, _self_]
run: {name: tiny, device: cpu, log_every: 1, threads_per_rank: 1}
data: {num_frames: 2, frame_stride: 2, frame_size: 16, audio_s: 0.5}
model: {embed_dim: 16, hidden_dim: 32, visual: {name: mean_color, width: 8}, audio: {name: mean_level, width: 8}}
optim: {global_batch: 24}
monitor: {media_clips: 0}
phases:
  learn: {kind: contrastive, epochs: 1, negatives_source: hinge}
  classify: {kind: supervised, epochs: 1, targets: given, loss: smoothed}
  summary: {kind: summary, digits: 2}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of installed packages with one that extends distav."""
    site = tmp_path_factory.mktemp("site")
    (site / "another_package.py").write_text(MODULE)
    metadata = site / "another_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: another_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def run_train(
    site: Path | None, folder: Path, *arguments: str, config: str = CONFIG
) -> subprocess.CompletedProcess[str]:
    """Run train.py on one rank, with the packages of a directory installed."""
    file = folder / "tiny.yaml"
    file.write_text(config)
    paths = {"PYTHONPATH": f"{site}:{ROOT}"} if site else {}
    return subprocess.run(
        [sys.executable, str(ROOT / "distav" / "train.py"), "--config", str(file), *arguments],
        env=environment() | paths, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_components_of_another_package_train(site: Path, tiny_shards: Path, tmp_path: Path):
    done = run_train(site, tmp_path, f"data.root={tiny_shards}", f"run.root={tmp_path}")
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "tiny"
    report = json.loads((run / "report.json").read_text())
    assert [phase["kind"] for phase in report["phases"]] == ["contrastive", "supervised", "summary"]
    assert len(losses(run)) == 8 and all(math.isfinite(loss) for loss in losses(run))
    assert -1 <= json.loads((run / "summary.json").read_text())["pair_similarity"] <= 1
    saved = {}
    for path in last_checkpoint(run).glob("*.safetensors"):
        saved |= safetensors.torch.load_file(path)
    assert any("colors.weight" in name for name in saved) and any("levels.weight" in name for name in saved)
    visits = [tensor for name, tensor in saved.items() if "smoothed_visits" in name]
    assert len(visits) == 1 and visits[0].tolist() == [1.0] * 96


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.classify.loss=smooth", "phases.classify.loss=smooth: allowed: ce, gce, elr, sop, bce, asymmetric, "
                                        "smoothed, removed. "
                                        "Did you mean 'smoothed'?"),
        ("phases.classify.loss=removed", "phases.classify.loss=removed: entry point 'another_package:Removed' of "
                                         "distav.classification_losses cannot be loaded"),
        ("phases.learn.num_negatives=8", "phases.learn.num_negatives=8: hinge compares samples of the batch only"),
        ("phases.summary.digits=-1", "phases.summary.digits=-1: allowed: 0 or more"),
        ("phases.summary.digit=1", "Did you mean 'phases.summary.digits'?"),
        ("model.visual.name=mean_colour", "Did you mean 'mean_color'?"),
    ],
)  # fmt: skip
def test_errors_include_components_of_another_package(site: Path, override: str, message: str, tmp_path: Path):
    done = run_train(site, tmp_path, "--print-config", override)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_names_are_unknown_if_the_package_is_not_installed(tmp_path: Path):
    done = run_train(None, tmp_path, "--print-config", "~phases.summary")
    assert (
        done.returncode == 1
        and ".yaml: phases.summary.kind=summary: not a kind of phase; allowed: contrastive" in done.stderr
    )


def test_phase_without_a_function_is_reported_before_training(site: Path, tiny_shards: Path, tmp_path: Path):
    config = CONFIG + "  wait: {kind: idle}\n"
    done = run_train(site, tmp_path, f"data.root={tiny_shards}", f"run.root={tmp_path}", config=config)
    assert done.returncode == 1
    assert "phases.wait.kind=idle: another_package.Idle has no static method run" in done.stderr
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists() or not losses(tmp_path / "tiny")
