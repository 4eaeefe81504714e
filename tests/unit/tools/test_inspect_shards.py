"""What inspect_shards.py tells of a set, and shows of it."""

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
from distav.data.preparation.annotated_videos import FeatureFolder
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, encode_audio, encode_video
from distav.data.preparation.llp import LLPSource
from distav.tools.inspect_shards.command import main
from distav.tools.inspect_shards.drawing import FRAME, PAD, TEXT, WAVE, places
from distav.tools.inspect_shards.measurements import loudness_lufs, measure_clip, peak_dbfs
from distav.tools.inspect_shards.text_table import table, width
from tests.conftest import ROOT
from tests.helpers.events import STREAMS, write_llp

ENCODING = Encoding(short_side=32, clip_s=1, sample_rate_hz=8000)
KINDS = ("plain", "silent", "black", "still", "plain", "plain")
LONG = "späť 犬の声 " * 12


def clip_of(kind: str, rng: np.random.Generator) -> Clip:
    """A textured picture that drifts, with a tone, but for what the kind lacks; black has a speck that drifts."""
    ground = rng.integers(60, 200, (32, 64, 3), dtype=np.uint8)
    steps = np.zeros(8, int) if kind == "still" else 4 * np.arange(8)
    frames = np.stack([np.roll(ground, step, axis=1) for step in steps])
    if kind == "black":
        frames //= 25
        for number, step in enumerate(steps):
            frames[number, 10:12, 10 + step : 12 + step] = 255
    sound = 0.1 * np.sin(2 * np.pi * 997 * np.arange(8000) / 8000, dtype=np.float32)
    return Clip(frames, 0.004 * sound if kind == "silent" else sound)


@dataclass(frozen=True)
class Kinds:
    """Clips of some kinds, whose sources tell which is which."""

    def candidates(self) -> list[ClipSource]:
        return [
            ClipSource(f"{kind}-{place}", LONG if place else "dog", split)
            for split in ("train", "test")
            for place, kind in enumerate(KINDS)
        ]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        yield clip_of(candidate.source.split("-")[0], rng)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kinds") / "set"
    build_dataset(Kinds(), out, BuildConfig(ENCODING), 1)
    return out


def keys_of(root: Path, kind: str, split: str = "train") -> list[str]:
    columns = ShardedDataset.open(root).split(split).columns
    return [str(key) for key, source in zip(columns["key"], columns["source"], strict=True) if source.startswith(kind)]


def figures(root: Path, *more: str, status: int = 0) -> dict:
    assert main(["stats", str(root), "--workers=1", f"--json={root / 'stats.json'}", *more]) == status
    return json.loads((root / "stats.json").read_text())


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_silent_black_and_still_are_told_apart_in_every_codec(codec: str):
    encoding, rng = replace(ENCODING, codec=codec), np.random.default_rng(0)
    for kind in KINDS:
        made = clip_of(kind, rng)
        frames, sound = decode_clip(made.members(encoding))
        assert frames.shape == made.frames.shape and frames.dtype == np.uint8
        assert np.abs(sound - made.waveform).max() < 1e-4 and sound.dtype == np.float32
        found = measure_clip(frames, sound, 8000)
        assert {each for each in ("silent", "black", "still") if found[each]} == {kind} - {"plain"}


def test_loudness_and_peak_are_those_of_the_standard():
    seconds = np.arange(48000 * 2) / 48000
    tone = np.sin(2 * np.pi * 997 * seconds).astype(np.float32)
    assert loudness_lufs(0.1 * tone, 48000) == pytest.approx(-23.01, abs=0.1)
    assert peak_dbfs(0.1 * tone) == pytest.approx(-20, abs=0.01)
    assert loudness_lufs(tone[: int(0.39 * 48000)], 48000) is None
    assert loudness_lufs(0 * tone, 48000) is None and peak_dbfs(0 * tone) == pytest.approx(-120)


def test_stats_names_the_clips_that_lack_something(kinds: Path, capsys: pytest.CaptureFixture[str]):
    found = figures(kinds, "--clips=0")
    said = capsys.readouterr().out
    for split in ("train", "test"):
        decoded = found["splits"][split]["decoded"]
        for kind in ("silent", "black", "still"):
            assert decoded[kind] == keys_of(kinds, kind, split), (split, kind)
            assert keys_of(kinds, kind, split)[0] in said
        assert decoded["damaged"] == decoded["undecodable"] == {}
    assert max(width(line) for line in said.splitlines()) <= 120


def test_stats_counts_what_is_there(kinds: Path):
    train = figures(kinds, "--clips=4")["splits"]["train"]
    split = ShardedDataset.open(kinds).split("train")
    assert train["clips"] == 6 and train["decoded"]["clips"] == 4
    assert train["classes"] == {LONG: {"clips": 5, "share": 5 / 6}, "dog": {"clips": 1, "share": 1 / 6}}
    assert train["sources"] == 6 and train["sources_by_clips"] == {"1": 6}
    assert train["hours"] == pytest.approx(6 / 3600) and train["frame_sizes"] == {"64x32": 6}
    assert train["tar_bytes"] == (kinds / "train-000000.tar").stat().st_size
    sizes = split.columns["video_bytes"]
    assert train["member_bytes"]["video"]["mean"] == pytest.approx(sizes.mean())
    assert train["member_bytes"]["video"]["p50"] == pytest.approx(np.median(sizes))


def test_stats_counts_damaged_members_and_ends_with_the_status_of_verify(kinds: Path, tmp_path: Path):
    root = Path(shutil.copytree(kinds, tmp_path / "set"))
    columns = ShardedDataset.open(root).split("train").columns
    with open(root / "train-000000.tar", "r+b") as file:
        for sample, member in ((1, "video"), (2, "audio"), (4, "video")):
            file.seek(int(columns[f"{member}_offset"][sample]) + 40)
            file.write(b"\x00\xff\x5a")
    decoded = figures(root, "--clips=0", status=2)["splits"]["train"]["decoded"]
    assert decoded["damaged_members"] == {"video": 2, "audio": 1}
    assert list(decoded["damaged"]) == [f"train-00000000{sample}" for sample in (1, 2, 4)]
    assert "CRC-32 differs" in decoded["damaged"]["train-000000001"]["video"]
    assert main(["preview", str(root), f"--out={tmp_path / 'a.png'}"]) == 2


@pytest.mark.long
def test_the_tool_decodes_in_processes_to_the_same_figures(tiny_shards: Path, tmp_path: Path):
    options = ["stats", str(tiny_shards), "--clips=40", "--seed=5"]
    assert main([*options, "--workers=1", f"--json={tmp_path / 'one.json'}"]) == 0
    tool = [sys.executable, str(ROOT / "tools" / "inspect_shards.py"), *options]
    subprocess.run([*tool, "--workers=2", f"--json={tmp_path / 'two.json'}"], check=True, capture_output=True)
    written = (tmp_path / "one.json").read_bytes()
    assert written == (tmp_path / "two.json").read_bytes()
    assert json.loads(written)["splits"]["train"]["decoded"]["clips"] == 40


def test_a_sheet_shows_frames_sound_and_text_of_every_clip(kinds: Path, tmp_path: Path):
    out = tmp_path / "sheet.png"
    chosen = [*keys_of(kinds, "plain"), *keys_of(kinds, "still")]
    assert main(["preview", str(kinds), "--keys", *chosen, "--frames=3", f"--out={out}"]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        sheet = np.asarray(picture)
    size, corners = places(4, 3)
    assert sheet.shape == (size[1], size[0], 3)
    split, shown = ShardedDataset.open(kinds).split("train"), []
    reader = ShardReader(split)
    for key, (left, top) in zip(chosen, corners, strict=True):
        cell = sheet[top:, left : left + 3 * FRAME[0] + 2 * PAD]
        assert len(np.unique(cell[:TEXT].reshape(-1, 3), axis=0)) > 5
        frames, _ = decode_clip(reader.read(split.keys.tolist().index(key)))
        pictures = cell[PAD + TEXT : PAD + TEXT + FRAME[1]]
        for place, number in enumerate((0, 4, 7)):
            field = pictures[:, PAD + place * FRAME[0] :][:, : FRAME[0]].astype(float)
            inside = field[20:-20, 4:-4]
            assert np.abs(inside.mean(axis=(0, 1)) - frames[number].mean(axis=(0, 1))).max() < 12
            shown.append(inside)
        wave = cell[2 * PAD + TEXT + FRAME[1] :][:WAVE, PAD : PAD + 3 * FRAME[0]]
        assert (wave < 200).any(axis=2).mean() > 0.5
    changes = [np.abs(a - b).mean() > 1 for a, b in zip(shown, shown[1:], strict=False)]
    assert changes == [True] * 9 + [False] * 2


def test_show_draws_by_class_and_seed(kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def told(*more: str) -> str:
        assert main(["preview", str(kinds), f"--out={tmp_path / 'a.png'}", *more]) == 0
        return capsys.readouterr().out

    assert told("--class=dog").count("train-0000000") == 1
    assert told("--clips=3").count("train-0000000") == 3 and "犬" in told("--clips=3")
    assert told("--clips=3", "--seed=1") == told("--clips=3", "--seed=1") != told("--clips=3", "--seed=2")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["preview", "--class=dig"], "--class=dig: allowed"),
        (["preview", "--keys", "train-9"], "--keys train-9: not in split train"),
        (["preview", "--split=tset"], "Did you mean 'test'"),
        (["preview", "--clips=0"], "--clips=0: allowed: from 1 up"),
        (["preview", "--out=a.jpg"], "has to end in .png"),
        (["stats", "--workers=0"], "--workers=0: allowed: from 1 up"),
        (["stats", "--json=none/a.json"], "none/"),
    ],
)
def test_wrong_arguments_are_named(kinds: Path, given: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert main([given[0], str(kinds), *given[1:]]) == 2
    assert expected in capsys.readouterr().err


def test_features_are_counted_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_llp(tmp_path / "llp")
    streams = tuple(
        FeatureFolder(modality, name, tmp_path / "llp" / name) for name, (modality, _, _) in STREAMS.items()
    )
    build_dataset(LLPSource(tmp_path / "llp", None, streams), tmp_path / "set", BuildConfig(Encoding(clip_s=10)), 1)
    train = figures(tmp_path / "set")["splits"]["train"]
    assert train["decoded"]["blank"] == [] and 0.1 < train["decoded"]["rms"]["res152"]["mean"] < 2
    assert sum(each["clips"] for each in train["classes"].values()) == 24 + 2 * 24
    assert main(["preview", str(tmp_path / "set")]) == 2
    assert "holds features, res152, vggish" in capsys.readouterr().err


def test_what_cannot_be_decoded_is_refused_with_a_reason():
    whole = clip_of("plain", np.random.default_rng(0)).members(ENCODING)
    with pytest.raises(DecodeError, match="no member 'video'"):
        decode_clip({"vggish": b""})
    for content in (b"", b"no film", whole["video"][:100], whole["audio"]):
        with pytest.raises(DecodeError, match=r"^picture: \w"):
            decode_video(content)
    for content in (b"", b"no sound", whole["audio"][:30], whole["video"]):
        with pytest.raises(DecodeError, match=r"^sound: \w"):
            decode_audio(content)
    assert len(decode_video(encode_video(np.zeros((3, 16, 16, 3), np.uint8), ENCODING))) == 3
    assert len(decode_audio(encode_audio(np.zeros(50, np.float32), 8000))) == 50


def test_tables_line_up_and_cannot_move_the_cursor():
    shown = table(("label", "n"), [("犬", 5), ("\x1b[2J\n", 12), ("x" * 90, 7)]).splitlines()
    assert len({width(line) for line in shown}) == 1 and len(shown) == 4
    assert "\x1b" not in "".join(shown) and shown[-1].startswith("x" * 45 + "...")
