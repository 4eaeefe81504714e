"""tools/inspect_shards.py: statistics and contact sheets of datasets."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distav.data.dataset import ShardedDataset
from distav.data.pipeline.decoding import decode_audio, decode_clip, decode_video
from distav.data.pipeline.reader import DecodeError, ShardReader
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, encode_audio, encode_video
from distav.data.preparation.sources.annotated_videos import FeatureFolder
from distav.data.preparation.sources.llp import LLPSource
from distav.drawing.text import display_width
from distav.tools.inspect_shards.command import main
from distav.tools.inspect_shards.drawing import FRAME, PAD, TEXT, WAVE, layout
from distav.tools.inspect_shards.measurements import measure_clip, peak_dbfs
from distav.tools.inspect_shards.text_table import format_table
from tests.conftest import ROOT
from tests.helpers.events import STREAMS, write_llp

ENCODING = Encoding(short_side=32, clip_s=1, sample_rate_hz=8000)
TRAITS = ("plain", "silent", "black", "still", "plain", "plain")
LONG = "späť 犬の声 " * 12


def make_clip(trait: str, rng: np.random.Generator) -> Clip:
    """Return moving texture with a tone, except for the trait; a black clip has a small moving spot."""
    texture = rng.integers(60, 200, (32, 64, 3), dtype=np.uint8)
    steps = np.zeros(8, int) if trait == "still" else 4 * np.arange(8)
    frames = np.stack([np.roll(texture, step, axis=1) for step in steps])
    if trait == "black":
        frames //= 25
        for index, step in enumerate(steps):
            frames[index, 10:12, 10 + step : 12 + step] = 255
    audio = 0.1 * np.sin(2 * np.pi * 997 * np.arange(8000) / 8000, dtype=np.float32)
    return Clip(frames, 0.004 * audio if trait == "silent" else audio)


@dataclass(frozen=True)
class TraitSource:
    """Clips with each trait, which is part of their source names."""

    def candidates(self) -> list[ClipSource]:
        return [
            ClipSource(f"{trait}-{index}", LONG if index else "dog", split)
            for split in ("train", "test")
            for index, trait in enumerate(TRAITS)
        ]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        yield make_clip(candidate.source.split("-")[0], rng)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("traits") / "dataset"
    build_dataset(TraitSource(), out, BuildConfig(ENCODING), 1)
    return out


def keys_of(root: Path, trait: str, split: str = "train") -> list[str]:
    columns = ShardedDataset.open(root).split(split).columns
    return [str(key) for key, source in zip(columns["key"], columns["source"], strict=True) if source.startswith(trait)]


def stats_of(root: Path, *options: str, status: int = 0) -> dict:
    assert main(["stats", str(root), "--workers=1", f"--json={root / 'stats.json'}", *options]) == status
    return json.loads((root / "stats.json").read_text())


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_silent_black_and_still_clips_are_detected_with_every_codec(codec: str):
    encoding, rng = replace(ENCODING, codec=codec), np.random.default_rng(0)
    for trait in TRAITS:
        clip = make_clip(trait, rng)
        frames, waveform = decode_clip(clip.members(encoding))
        assert frames.shape == clip.frames.shape and frames.dtype == np.uint8
        assert np.abs(waveform - clip.waveform).max() < 1e-4 and waveform.dtype == np.float32
        measured = measure_clip(frames, waveform, 8000)
        assert {name for name in ("silent", "black", "still") if measured[name]} == {trait} - {"plain"}


def test_peak_is_relative_to_full_scale():
    tone = np.sin(2 * np.pi * 997 * np.arange(48000) / 48000).astype(np.float32)
    assert peak_dbfs(0.1 * tone) == pytest.approx(-20, abs=0.01)
    assert peak_dbfs(0 * tone) == pytest.approx(-120)


def test_stats_lists_silent_black_and_still_clips(dataset: Path, capsys: pytest.CaptureFixture[str]):
    stats = stats_of(dataset, "--clips=0")
    output = capsys.readouterr().out
    for split in ("train", "test"):
        decoded = stats["splits"][split]["decoded"]
        for trait in ("silent", "black", "still"):
            assert decoded[trait] == keys_of(dataset, trait, split), (split, trait)
            assert keys_of(dataset, trait, split)[0] in output
        assert decoded["damaged"] == decoded["undecodable"] == {}
    assert max(display_width(line) for line in output.splitlines()) <= 120


def test_stats_counts_clips_classes_sources_and_bytes(dataset: Path):
    train = stats_of(dataset, "--clips=4")["splits"]["train"]
    split = ShardedDataset.open(dataset).split("train")
    assert train["clips"] == 6 and train["decoded"]["clips"] == 4
    assert train["classes"] == {LONG: {"clips": 5, "fraction": 5 / 6}, "dog": {"clips": 1, "fraction": 1 / 6}}
    assert train["sources"] == 6 and train["sources_by_clips"] == {"1": 6}
    assert train["hours"] == pytest.approx(6 / 3600) and train["frame_sizes"] == {"64x32": 6}
    assert train["tar_bytes"] == (dataset / "train-000000.tar").stat().st_size
    sizes = split.columns["video_bytes"]
    assert train["member_bytes"]["video"]["mean"] == pytest.approx(sizes.mean())
    assert train["member_bytes"]["video"]["p50"] == pytest.approx(np.median(sizes))


def test_stats_counts_damaged_members_and_exits_with_the_status_of_verify(dataset: Path, tmp_path: Path):
    root = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    columns = ShardedDataset.open(root).split("train").columns
    with open(root / "train-000000.tar", "r+b") as file:
        for sample, member in ((1, "video"), (2, "audio"), (4, "video")):
            file.seek(int(columns[f"{member}_offset"][sample]) + 40)
            file.write(b"\x00\xff\x5a")
    decoded = stats_of(root, "--clips=0", status=2)["splits"]["train"]["decoded"]
    assert decoded["damaged_members"] == {"video": 2, "audio": 1}
    assert list(decoded["damaged"]) == [f"train-00000000{sample}" for sample in (1, 2, 4)]
    assert "CRC-32 differs" in decoded["damaged"]["train-000000001"]["video"]
    assert main(["preview", str(root), f"--out={tmp_path / 'a.png'}"]) == 2


@pytest.mark.long
def test_the_tool_computes_the_same_statistics_in_worker_processes(tiny_shards: Path, tmp_path: Path):
    options = ["stats", str(tiny_shards), "--clips=40", "--seed=5"]
    assert main([*options, "--workers=1", f"--json={tmp_path / 'one.json'}"]) == 0
    tool = [sys.executable, str(ROOT / "tools" / "inspect_shards.py"), *options]
    subprocess.run([*tool, "--workers=2", f"--json={tmp_path / 'two.json'}"], check=True, capture_output=True)
    written = (tmp_path / "one.json").read_bytes()
    assert written == (tmp_path / "two.json").read_bytes()
    assert json.loads(written)["splits"]["train"]["decoded"]["clips"] == 40


def test_a_sheet_shows_frames_audio_and_text_of_every_clip(dataset: Path, tmp_path: Path):
    out = tmp_path / "sheet.png"
    keys = [*keys_of(dataset, "plain"), *keys_of(dataset, "still")]
    assert main(["preview", str(dataset), "--keys", *keys, "--frames=3", f"--out={out}"]) == 0
    with Image.open(out) as image:
        assert image.format == "PNG"
        sheet = np.asarray(image)
    size, corners = layout(4, 3)
    assert sheet.shape == (size[1], size[0], 3)
    split, shown = ShardedDataset.open(dataset).split("train"), []
    reader = ShardReader(split)
    for key, (left, top) in zip(keys, corners, strict=True):
        cell = sheet[top:, left : left + 3 * FRAME[0] + 2 * PAD]
        assert len(np.unique(cell[:TEXT].reshape(-1, 3), axis=0)) > 5
        frames, _ = decode_clip(reader.read(split.keys.tolist().index(key)))
        strip = cell[PAD + TEXT : PAD + TEXT + FRAME[1]]
        for index, number in enumerate((0, 4, 7)):
            box = strip[:, PAD + index * FRAME[0] :][:, : FRAME[0]].astype(float)
            inside = box[20:-20, 4:-4]
            assert np.abs(inside.mean(axis=(0, 1)) - frames[number].mean(axis=(0, 1))).max() < 12
            shown.append(inside)
        wave = cell[2 * PAD + TEXT + FRAME[1] :][:WAVE, PAD : PAD + 3 * FRAME[0]]
        assert (wave < 200).any(axis=2).mean() > 0.5
    changes = [np.abs(a - b).mean() > 1 for a, b in zip(shown, shown[1:], strict=False)]
    assert changes == [True] * 9 + [False] * 2


def test_preview_selects_by_class_and_seed(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def output_of(*options: str) -> str:
        assert main(["preview", str(dataset), f"--out={tmp_path / 'a.png'}", *options]) == 0
        return capsys.readouterr().out

    assert output_of("--class=dog").count("train-0000000") == 1
    assert output_of("--clips=3").count("train-0000000") == 3 and "犬" in output_of("--clips=3")
    assert (
        output_of("--clips=3", "--seed=1") == output_of("--clips=3", "--seed=1") != output_of("--clips=3", "--seed=2")
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["preview", "--class=dig"], "--class=dig: allowed"),
        (["preview", "--keys", "train-9"], "--keys train-9: not in split train"),
        (["preview", "--class=dog", "--keys", "a"], "--class=dog contradicts --keys"),
        (["preview", "--split=tset"], "Did you mean 'test'"),
        (["preview", "--clips=0"], "--clips=0: allowed: 1 or more"),
        (["preview", "--out=a.jpg"], "must end in .png"),
        (["stats", "--workers=0"], "--workers=0: allowed: 1 or more"),
        (["stats", "--json=none/a.json"], "none/"),
    ],
)
def test_invalid_arguments_are_reported(
    dataset: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main([arguments[0], str(dataset), *arguments[1:]]) == 2
    assert expected in capsys.readouterr().err


def test_features_have_statistics_but_no_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_llp(tmp_path / "llp")
    streams = tuple(
        FeatureFolder(modality, name, tmp_path / "llp" / name) for name, (modality, _, _) in STREAMS.items()
    )
    build_dataset(LLPSource(tmp_path / "llp", None, streams), tmp_path / "dataset", BuildConfig(Encoding(clip_s=10)), 1)
    train = stats_of(tmp_path / "dataset")["splits"]["train"]
    assert train["decoded"]["blank"] == [] and 0.1 < train["decoded"]["rms"]["res152"]["mean"] < 2
    assert sum(entry["clips"] for entry in train["classes"].values()) == 24 + 2 * 24
    assert main(["preview", str(tmp_path / "dataset")]) == 2
    assert "a dataset of features (res152, vggish)" in capsys.readouterr().err


def test_undecodable_members_raise_an_error_with_a_reason():
    members = make_clip("plain", np.random.default_rng(0)).members(ENCODING)
    with pytest.raises(DecodeError, match="no member 'video'"):
        decode_clip({"vggish": b""})
    for content in (b"", b"no film", members["video"][:100], members["audio"]):
        with pytest.raises(DecodeError, match=r"^video: \w"):
            decode_video(content)
    for content in (b"", b"no sound", members["audio"][:30], members["video"]):
        with pytest.raises(DecodeError, match=r"^audio: \w"):
            decode_audio(content)
    assert len(decode_video(encode_video(np.zeros((3, 16, 16, 3), np.uint8), ENCODING))) == 3
    assert len(decode_audio(encode_audio(np.zeros(50, np.float32), 8000))) == 50


def test_tables_are_aligned_and_have_no_control_characters():
    lines = format_table(("label", "n"), [("犬", 5), ("\x1b[2J\n", 12), ("x" * 90, 7)]).splitlines()
    assert len({display_width(line) for line in lines}) == 1 and len(lines) == 4
    assert "\x1b" not in "".join(lines) and lines[-1].startswith("x" * 45 + "...")
