"""Training, evaluation and embedding of clips that lack video or audio."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from distav.config.errors import UserError
from distav.config.loading import load
from distav.data.data_module import DataModule
from distav.tools.make_shards import main as make_shards
from tests.helpers.launch import ROOT, TINY, tiny_config, train
from tests.helpers.media import write_media, write_silent

CLASSES = ("bell", "engine", "rain")
CONFIG = TINY.replace("global_batch: 24", "global_batch: 12").replace("[6, 12]", "[4, 8]").replace("[0, 6]", "[0, 4]")
WITHIN = "phases.contrastive.within_modal_weight=1"
ENCODING = ("--clip-s=1", "--fps=8", "--short-side=32", "--sample-rate=8000", "--workers=1")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset with 9 test and 36 training clips; a third has both modalities, a third video and a third audio."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for index, label in enumerate(CLASSES):
        for number in range(5):
            files = {f"{label}-{number}.mp4": write_media, f"{label}-{number}.avi": write_silent}
            for name, write in files.items():
                write(folder / name, 1.0, size=(48 + 16 * index, 48))
            write_tone(folder / f"{label}-{number}.wav", index, number)
            split = "test" if number == 0 else "train"
            rows += [(name, label, split) for name in (*files, f"{label}-{number}.wav")]
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    assert make_shards(["csv", str(folder / "clips.csv"), str(folder / "shards"), "--modalities=any", *ENCODING]) == 0
    return folder / "shards"


def write_tone(path: Path, index: int, seed: int) -> None:
    """Write a second of a tone whose pitch depends on the class, with noise."""
    noise = np.random.default_rng([index, seed]).normal(0, 0.1, 8000)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 500 * (index + 1) * np.arange(8000) / 8000) + noise, 8000)


def train_on(shards: Path, folder: Path, *overrides: str, ranks: int = 1) -> dict:
    """Train the tiny configuration and return its report."""
    train(tiny_config(folder, CONFIG), f"data.root={shards}", f"run.root={folder}", *overrides, ranks=ranks)
    return json.loads((folder / "tiny" / "report.json").read_text())


def test_clips_with_one_modality_are_trained_evaluated_and_embedded(mixed: Path, tmp_path: Path):
    report = train_on(mixed, tmp_path, WITHIN)
    assert report["samples"] == 36 and not report["quarantined_samples"]
    assert {"top1", "top1_visual", "top1_audio", "v2a_map"} <= report["test"].keys()
    table = pq.read_table(tmp_path / "tiny" / "labels" / "correction.parquet")
    assert not np.isnan(table.column("confidence").to_numpy()).any()
    losses = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["train/loss"]) for record in losses if "train/loss" in record)
    export, metrics = tmp_path / "tiny" / "export", tmp_path / "metrics.json"
    evaluate = [
        ROOT / "distav" / "evaluate.py",
        export,
        mixed,
        "--json",
        metrics,
        "--device",
        "cpu",
        "--neighbors",
        "3",
    ]
    subprocess.run([sys.executable, *map(str, evaluate)], check=True, capture_output=True, cwd=tmp_path)
    scores = json.loads(metrics.read_text())["metrics"]
    assert scores["knn"].keys() == scores["linear_probe"].keys()
    assert {f"{name}_{modality}" for name in ("top1", "map") for modality in ("visual", "audio", "both")} <= scores[
        "knn"
    ].keys()
    embed = [ROOT / "tools" / "embed.py", export, mixed, "--out", tmp_path / "embeddings", "--device", "cpu"]
    subprocess.run([sys.executable, *map(str, embed)], check=True, capture_output=True, cwd=tmp_path)
    rows = pq.read_table(tmp_path / "embeddings", columns=["source", "visual", "audio_embedding"]).to_pylist()
    assert len(rows) == 45
    for row in rows:
        suffix = Path(row["source"]).suffix
        assert (row["visual"] is None) == (suffix == ".wav") and (row["audio_embedding"] is None) == (suffix == ".avi")


@pytest.mark.long
def test_two_ranks_train_clips_with_one_modality_as_one_rank_does(mixed: Path, tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = train_on(mixed, tmp_path / "one", WITHIN)
    two = train_on(mixed, tmp_path / "two", WITHIN, "memory_bank.replicate_below_mib=0", ranks=2)
    tables = [pq.read_table(tmp_path / name / "tiny" / "labels" / "correction.parquet") for name in ("one", "two")]
    first, second = (table.column("confidence").to_numpy() for table in tables)
    np.testing.assert_allclose(first, second, atol=0.02)
    assert one["phases"][0]["steps"] == two["phases"][0]["steps"]


@pytest.mark.long
@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_a_dataset_of_one_modality_is_trained_with_the_within_modal_loss(modality: str, tmp_path: Path):
    for index, label in enumerate(CLASSES):
        (tmp_path / "files" / label).mkdir(parents=True)
        for number in range(12):
            path = tmp_path / "files" / label / f"{number}"
            if modality == "audio":
                write_tone(path.with_suffix(".wav"), index, number)
            else:
                write_silent(path.with_suffix(".mkv"), 1.0, size=(48 + 16 * index, 48))
    command = ["videos", str(tmp_path / "files"), str(tmp_path / "shards"), "--modalities=any", *ENCODING]
    assert make_shards(command) == 0
    with pytest.raises(UserError, match="within_modal_weight=1"):
        DataModule.open(load(tiny_config(tmp_path, CONFIG), [f"data.root={tmp_path / 'shards'}"]))
    report = train_on(tmp_path / "shards", tmp_path, WITHIN)
    other = "visual" if modality == "audio" else "audio"
    assert {"top1", f"top1_{modality}"} <= report["test"].keys()
    assert not {f"top1_{other}", f"balanced_accuracy_{other}", "rsum"} & report["test"].keys()
    assert report["corrections"][0]["label_noise_rate"]["ci95_high"] <= 1
