"""make_shards.py offers every registered source, including those of other packages."""

from pathlib import Path

import numpy as np
import pytest

from distav.data.annotations.events import load_events
from distav.data.dataset import ShardedDataset
from distav.data.preparation.registry import SOURCES
from distav.data.preparation.source import AnnotatedSource
from distav.tools.make_shards import main
from tests.conftest import run_make_shards

PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distav.config.errors import UserError
from distav.data.preparation.encoding import Clip, ClipSource, Encoding
from distav.data.preparation.source import SourceInfo


@dataclass(frozen=True)
class TonesSource:
    """Clips with one tone each, whose second half is annotated."""

    description: ClassVar[str] = "Clips with a low or a high tone."
    example: ClassVar[str] = "make_shards.py tones shards/tones --count 4"
    default_encoding: ClassVar[Encoding] = Encoding(short_side=16, clip_s=2.0, sample_rate_hz=8000)
    clip_seconds: ClassVar[float] = 2.0

    count: int

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--count", type=int, required=True, help="clips per split")

    @classmethod
    def from_options(cls, options):
        if options.count < 1:
            raise UserError(f"--count={options.count}: has to be 1 or more.")
        return cls(options.count)

    def candidates(self):
        return [
            ClipSource(f"{split}-{number}", ("low", "high")[number % 2], split)
            for split in ("train", "test")
            for number in range(self.count)
        ]

    def clips(self, candidate, encoding, rng):
        time = np.arange(encoding.num_audio_samples) / encoding.sample_rate_hz
        pitch = 200 if candidate.label == "low" else 800
        frames = rng.integers(0, 255, (encoding.num_frames, encoding.side, encoding.side, 3), dtype=np.uint8)
        yield Clip(frames, np.sin(2 * np.pi * pitch * time).astype(np.float32))

    def info(self):
        classes = ["low", "high"]
        events = {}
        for candidate in self.candidates():
            if candidate.split == "test":
                annotation = np.zeros((2, 2, 2), dtype=bool)
                annotation[:, 1, classes.index(candidate.label)] = True
                events[candidate.split, candidate.source, candidate.label] = annotation
        return SourceInfo(classes, events=events)
'''


def install(folder: Path, entry_point: str) -> None:
    """Write an importable package with an entry point in the group of the sources."""
    (folder / "tones_package.py").write_text(PACKAGE)
    metadata = folder / "tones_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tones_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[distav.sources]\ntones = {entry_point}\n")


@pytest.fixture
def tones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package with the source `tones` importable for new processes."""
    install(tmp_path, "tones_package:TonesSource")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def test_a_source_of_another_package_is_a_command_with_its_own_options(tones: Path):
    assert "Clips with a low or a high tone." in run_make_shards("--help").stdout
    usage = run_make_shards("tones", "--help").stdout
    assert "--count COUNT" in usage and "(default: 8000)" in usage and "example: make_shards.py tones" in usage
    out = tones / "out"
    run_make_shards("tones", out, "--count=4", "--label-noise=symmetric:0.5", "--workers=1")
    shards = ShardedDataset.open(out)
    train, test = shards.split("train"), shards.split("test")
    assert shards.classes == ["low", "high"] and (len(train), len(test)) == (4, 4)
    assert shards.manifest["splits"]["train"]["noise"]["label_rate"] == 0.5
    labels = load_events(shards, test)
    assert labels.events is not None and not labels.events[:, :, 0].any()
    assert np.array_equal(labels.events[:, 0, 1], labels.weak) and np.array_equal(labels.events[:, 1, 1], labels.weak)
    assert shards.manifest["annotated_splits"] == ["test"]
    assert "--count=0: has to be 1 or more" in run_make_shards("tones", tones / "none", "--count=0", status=1).stderr
    error = run_make_shards("tones", tones / "none", "--count=1", "--clip-s=1", status=1).stderr
    assert "--clip-s=1: has to be 2, the duration of the annotations" in error
    assert "other arguments" in run_make_shards("tones", out, "--count=7", status=1).stderr


def test_a_source_that_cannot_be_imported_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, "tones_package:NoSource")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    error = run_make_shards("synthetic", tmp_path / "out", status=1).stderr
    assert "entry point 'tones_package:NoSource' of distav.sources cannot be loaded" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_help_of_a_command_shows_the_defaults_of_its_source(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    source = SOURCES[name]
    assert f"example: {source.example}" in text
    assert f"duration of a clip in seconds (default: {source.default_encoding.clip_s})" in text


def test_annotated_sources_are_recognized_by_their_interface():
    annotated = {name for name, source in SOURCES.items() if isinstance(object.__new__(source), AnnotatedSource)}
    lists = {"vggsound", "kinetics", "kinetics-sounds", "audioset", "ucf101", "hmdb51", "esc50"}
    assert annotated == {"llp", "ave", "tars", "parquet", "csv", "synthetic-multi"} | lists
