"""Clips of natural datasets, made from small repositories with the layout of the public ones."""

import csv
import io
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset
from tests.conftest import make_shards
from tools.bench.natural import clip_lists
from tools.bench.natural.repositories import Repository, read_audio
from tools.bench.noise.datasets import NATURAL, PRETRAINED, natural_datasets

RATE = 16_000


def commit(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "data"]):
        subprocess.run([*git, *words], check=True, capture_output=True)


def sound(seconds: float) -> bytes:
    content = io.BytesIO()
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    soundfile.write(content, tone, RATE, format="OGG" if seconds > 1 else "WAV")
    return content.getvalue()


def photo(gray: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (gray, gray, gray)).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clip_lists, "SOUNDS", replace(clip_lists.SOUNDS, commit="HEAD"))
    folder = tmp_path / "sources"
    photos = {
        f"{split}/{label}/{index:04}.jpg": photo(10 * index)
        for split in ("train", "test") for label in clip_lists.CLASSES for index in range(8)
    }  # fmt: skip
    commit(folder / "CIFAR-10-images", photos)
    recordings = {}
    for number, name in enumerate(clip_lists.SOUND_OF.values()):
        recordings[f"{number:03} - {name}/1-{number}-A.ogg"] = sound(2.5)
        recordings[f"{number:03} - {name}/5-{number}-A.ogg"] = sound(5.0)
    commit(folder / "ESC-10", recordings)
    digits = {f"recordings/{digit}_me_{index}.wav": sound(0.4) for digit in range(10) for index in (0, 7)}
    commit(folder / "free-spoken-digit-dataset", digits)
    return folder


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def test_sounds_are_cut_without_silence_and_get_photographs_of_their_class(sources: Path, tmp_path: Path):
    table = clip_lists.write_clips(clip_lists.photos_sounds, sources, tmp_path / "out")
    counts = Counter((row["split"], row["label"]) for row in rows(table))
    assert len(counts) == 20
    # The middle of a short recording, in three of five parts, lies between zeros.
    assert all(number == (5 if split == "test" else 3) for (split, _), number in counts.items())
    shards = tmp_path / "shards"
    make_shards("csv", table, shards, *NATURAL["photos and sounds"].encoding, "--correspondence-noise", 0.4)
    train = ShardedDataset.open(shards).split("train")
    assert len(train) == 30 and train.has_modality("visual").all() and train.has_modality("audio").all()


def test_recordings_of_digits_are_not_in_both_splits(sources: Path, tmp_path: Path):
    table = clip_lists.write_clips(clip_lists.photos_digits, sources, tmp_path / "out")
    counts = Counter(row["split"] for row in rows(table))
    assert counts == {"train": 10, "test": 10 * clip_lists.PHOTOS_PER_RECORDING}
    before = table.stat().st_mtime_ns
    assert clip_lists.write_clips(clip_lists.photos_digits, sources, tmp_path / "out").stat().st_mtime_ns == before


def test_audio_is_decoded_at_another_rate():
    audio = read_audio(sound(0.5), 8000)
    assert abs(len(audio) - 4000) < 20 and 0.4 < np.abs(audio).max() < 0.6


def test_missing_sources_are_reported(tmp_path: Path, sources: Path):
    with pytest.raises(UserError, match=r"--sources=.*: LipNet is no clone of the GitHub repository TVR28/LipNet"):
        natural_datasets(sources, tmp_path, ("grid words",), None)
    with pytest.raises(UserError, match="with revision 0123"):
        Repository("x/ESC-10", "", "0123").files(sources)
    with pytest.raises(UserError, match="--visual-weights=None: no such file; photos and sounds, pretrained needs"):
        natural_datasets(sources, tmp_path, (f"photos and sounds{PRETRAINED}",), None)
