import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from distav.data.dataset import ShardedDataset
from distav.data.preparation.encode_workers import encode_all
from distav.data.preparation.encoding import Clip, ClipSource, Encoding
from distav.data.preparation.sources.digits import DigitsSource
from distav.data.preparation.sources.synthetic import SyntheticSource
from tests.conftest import ROOT, make_shards


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir()) if file.is_file()
    }


OPTIONS = ["--train-clips=150", "--test-clips=20", "--label-noise=asymmetric:0.4", "--correspondence-noise=0.4",
          "--shard-samples=50", "--short-side=24", "--seed=3"]  # fmt: skip


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "one"
    make_shards("synthetic", out, *OPTIONS, "--workers=1")
    return out


@pytest.mark.long
def test_bytes_do_not_depend_on_the_number_of_workers(synthetic: Path, tmp_path: Path):
    make_shards("synthetic", tmp_path / "two", *OPTIONS, "--workers=2")
    assert digests(tmp_path / "two") == digests(synthetic)
    make_shards("synthetic", tmp_path / "other", *[*OPTIONS, "--seed=4"], "--workers=2")
    assert digests(tmp_path / "other")["train-000000.tar"] != digests(synthetic)["train-000000.tar"]


@pytest.mark.parametrize("awaited_file", ["chunk", pytest.param("train-000001.tar", marks=pytest.mark.long)])
def test_a_killed_build_resumes_to_the_same_bytes(synthetic: Path, tmp_path: Path, awaited_file: str):
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "synthetic", str(out), *OPTIONS, "--workers=1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        files = [*out.glob(".work/chunk-*.json"), *out.glob("*.tar")]
        if any(awaited_file in file.name for file in files):
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = digests(out)
    assert process.returncode == -signal.SIGKILL and "manifest.json" not in before
    make_shards("synthetic", out, *OPTIONS, "--workers=2")
    assert digests(out) == digests(synthetic)


def test_a_directory_with_another_dataset_is_not_changed(synthetic: Path):
    before = digests(synthetic)
    assert "other arguments" in make_shards("synthetic", synthetic, "--train-clips=7", status=1).stderr
    assert "150 train" in make_shards("synthetic", synthetic, *OPTIONS).stdout
    assert digests(synthetic) == before


def test_tables_and_manifest_record_the_injected_noise(synthetic: Path):
    shards = ShardedDataset.open(synthetic)
    table = pq.read_table(synthetic / "labels.parquet")
    rows = [row for row in table.to_pylist() if row["split"] == "train"]
    assert [row["id"] for row in rows] == list(range(150))
    flipped = [row for row in rows if row["label"] != row["true_label"]]
    assert len(flipped) == 60
    classes = shards.classes
    assert all((classes.index(row["label"]) - classes.index(row["true_label"])) % 6 == 1 for row in flipped)
    swapped = [row for row in rows if row["pair_id"] != row["id"]]
    assert len(swapped) == 60 and len({row["pair_id"] for row in rows}) == 150
    noise = shards.manifest["splits"]["train"]["noise"]
    cross_class = sum(rows[row["pair_id"]]["true_label"] != row["true_label"] for row in rows) / 150
    assert noise == {"label_rate": 0.4, "swapped_audio_rate": 0.4, "cross_class_audio_rate": cross_class}
    clean = [row for row in table.to_pylist() if row["split"] == "test"]
    assert all(row["label"] == row["true_label"] and row["pair_id"] == row["id"] for row in clean)
    for shard in shards.manifest["splits"]["train"]["shards"]:
        assert hashlib.sha256((synthetic / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    labels_in_order = [row["true_label"] for row in rows[:60]]
    assert sum(a == b for a, b in zip(labels_in_order, labels_in_order[6:], strict=False)) < 30


def test_members_match_the_index_and_the_json_metadata(synthetic: Path):
    split = ShardedDataset.open(synthetic).split("train")
    content = split.shards[1].read_bytes()
    row = 57
    assert split.columns["shard"][row] == 1
    members = {
        name: content[split.columns[f"{name}_offset"][row] :][: split.columns[f"{name}_bytes"][row]]
        for name in ("video", "audio")
    }
    import webdataset

    sample = list(webdataset.WebDataset(str(split.shards[1]), shardshuffle=False))[7]
    metadata = json.loads(sample["json"])
    assert metadata["id"] == row
    for extension, name in (("avi", "video"), ("flac", "audio")):
        assert sample[extension] == members[name]
        assert metadata["sha256"][extension] == hashlib.sha256(members[name]).hexdigest()


def write_video(
    path: Path, seconds: float, fps: int = 25, size: tuple[int, int] = (64, 48), with_audio: bool = True
) -> None:
    """Write a video whose brightness is proportional to time, with a tone that starts after half a second."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4" if path.suffix == ".mp4" else "libvpx", rate=fps)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        audio = (
            container.add_stream("aac" if path.suffix == ".mp4" else "libopus", rate=48000, layout="stereo")
            if with_audio
            else None
        )
        for number in range(round(seconds * fps)):
            shade = np.full((size[1], size[0], 3), min(255, round(number / fps * 50)), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(video.encode())
        if audio:
            time_s = np.arange(round(seconds * 48000)) / 48000
            wave = (0.4 * np.sin(2 * np.pi * 500 * time_s) * (time_s > 0.5)).astype(np.float32)
            for start in range(0, len(wave), 960):
                stereo = np.stack([wave[start : start + 960]] * 2)
                frame = av.AudioFrame.from_ndarray(stereo, format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = 48000, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())


def write_bad_files(folder: Path) -> None:
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    content = (folder / "good0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    content = (folder / "long.webm").read_bytes()
    (folder / "cut.webm").write_bytes(content[: len(content) // 3])
    write_video(folder / "silent.mp4", 3, with_audio=False)
    write_video(folder / "short.mp4", 0.5)
    soundfile.write(folder / "music.wav", np.zeros(48000, np.float32), 16000)
    (folder / "empty.mp4").touch()


def test_csv_builds_readable_clips_and_lists_the_others(tmp_path: Path):
    for number in range(3):
        write_video(tmp_path / f"good{number}.mp4", 3, size=(64, 48) if number else (48, 80))
    write_video(tmp_path / "long.webm", 5)
    write_bad_files(tmp_path)
    lines = ["path,label,start_s,end_s,split"]
    lines += [f"good{number}.mp4,a,,,{'test' if number == 2 else 'train'}" for number in range(3)]
    lines += ["long.webm,b,1,4,train", "long.webm,b,4.5,8,train"]
    bad = ("text.mp4", "cut.mp4", "cut.webm", "silent.mp4", "short.mp4", "music.wav", "empty.mp4", "gone.mp4")
    lines += [f"{name},b,,,train" for name in bad]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    arguments = ["--clip-s=1.5", "--fps=10", "--short-side=32", "--sample-rate=16000"]
    output = make_shards("csv", tmp_path / "clips.csv", out, *arguments, status=3).stdout
    rejected = {row["path"]: row["reason"] for row in csv.DictReader((out / "rejected.csv").open())}
    assert {name: reason.split(":")[0] for name, reason in rejected.items()} == {
        "long.webm": "too short",
        "text.mp4": "not a video",
        "cut.mp4": "truncated",
        "cut.webm": "truncated",
        "silent.mp4": "no audio",
        "short.mp4": "too short",
        "music.wav": "no video",
        "empty.mp4": "truncated",
        "gone.mp4": "missing",
    }
    assert "9 candidates rejected" in output.splitlines()[-1]
    split = ShardedDataset.open(out).split("train")
    assert len(split) == 6 and len(ShardedDataset.open(out).split("test")) == 2
    columns = split.columns
    assert sorted(split.sources) == ["good0.mp4"] * 2 + ["good1.mp4"] * 2 + ["long.webm"] * 2
    portrait = np.array(split.sources) == "good0.mp4"
    assert set(columns["height"][portrait]) == {54} and set(columns["width"][portrait]) == {32}
    check_content(split)


def check_content(split) -> None:
    """Check that the brightness of each frame gives its time, and that the tone starts where it should."""
    import io

    for row in range(len(split)):
        columns = split.columns
        content = split.shards[0].read_bytes()
        video = content[columns["video_offset"][row] :][: columns["video_bytes"][row]]
        audio = content[columns["audio_offset"][row] :][: columns["audio_bytes"][row]]
        with av.open(io.BytesIO(video)) as container:
            shades = [frame.to_ndarray(format="rgb24").mean() / 50 for frame in container.decode(video=0)]
        times = columns["start_s"][row] + np.arange(15) / 10
        np.testing.assert_allclose(shades, times, atol=0.15)
        wave, rate = soundfile.read(io.BytesIO(audio))
        assert rate == 16000 and len(wave) == 24000
        loud = np.abs(wave) > 0.1
        if columns["start_s"][row] == 0:
            assert abs(loud.argmax() / rate - 0.5) < 0.06
        else:
            assert loud[:800].any()


def test_videos_reads_class_directories_and_keeps_sources_in_one_split(tmp_path: Path):
    for label in ("cat", "dog"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(4):
            write_video(tmp_path / "in" / label / f"{number}.webm", 2.1)
    out = tmp_path / "out"
    make_shards("videos", tmp_path / "in", out, "--test-fraction=0.25", "--clip-s=1", "--short-side=32")
    shards = ShardedDataset.open(out)
    train, test = shards.split("train"), shards.split("test")
    assert shards.classes == ["cat", "dog"] and len(train) == 12 and len(test) == 4
    assert not set(train.sources) & set(test.sources)
    assert len(set(train.source_codes)) == 6


def test_a_wrong_path_does_not_occupy_the_output_directory(tmp_path: Path):
    (tmp_path / "clips" / "dog").mkdir(parents=True)
    write_video(tmp_path / "clips" / "dog" / "a.mp4", 3.0)
    out, options = tmp_path / "shards", ("--workers=1", "--short-side=32", "--test-fraction=0")
    make_shards("videos", tmp_path / "clisp", out, *options, status=1)
    make_shards("videos", tmp_path / "clips", out, *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["csv", "none.csv", "out"], "no such file"),
        (["videos", "none", "out"], "no such directory"),
        (["synthetic", "out", "--codec=mpjeg"], "Did you mean 'mjpeg'"),
        (["synthetic", "out", "--label-noise=symetric:0.4"], "Did you mean 'symmetric'"),
        (["synthetic", "out", "--correspondence-noise=1.4"], "from 0 to 1"),
        (["synthetic", "out", "--fps=0"], "above 0"),
    ],
)
def test_invalid_arguments_are_reported(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert message in make_shards(*arguments, status=1).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", "column 'path' is missing"),
        ("path,label,start_s\na,b,x\n", "line 2"),
        ("path,label\n", "no rows"),
    ],
)
def test_invalid_lists_are_reported(text: str, message: str, tmp_path: Path):
    (tmp_path / "list.csv").write_text(text)
    assert message in make_shards("csv", tmp_path / "list.csv", tmp_path / "out", status=1).stderr


@dataclass(frozen=True)
class CrashingSource:
    """Crashes its process on one candidate, as malformed media do to decoders."""

    def candidates(self) -> list[ClipSource]:
        return [ClipSource(f"clip{number}", "a", "train") for number in range(4)]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        if candidate.source == "clip2":
            os.kill(os.getpid(), signal.SIGSEGV)
        yield Clip(rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), np.zeros(8000, np.float32))


def test_only_the_clip_that_crashes_the_decoder_is_rejected(tmp_path: Path):
    source = CrashingSource()
    encoded, rejected, _ = encode_all(source, Encoding(clip_s=1), 0, [source.candidates()], tmp_path, workers=1)
    assert [clip.source for clip in encoded] == ["clip0", "clip1", "clip3"]
    assert [(row["path"], "crashed" in row["reason"]) for row in rejected] == [("clip2", True)]


@pytest.fixture
def digit_files(real_data: Path) -> list[Path]:
    names = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "fsdd-recordings.tar.gz")
    return [real_data / "avdigits" / name for name in names]


def test_digits_combine_each_recording_with_unused_images(digit_files: list[Path]):
    candidates = DigitsSource(*digit_files).candidates()
    train = [candidate for candidate in candidates if candidate.split == "train"]
    test = [candidate for candidate in candidates if candidate.split == "test"]
    assert len(train) == 2700 and len(test) == 3000
    assert len({candidate.detail[1] for candidate in candidates}) == 5700
    assert all(int(str(candidate.detail[0]).split("_")[2][:-4]) < 5 for candidate in test)
    assert not {candidate.source for candidate in train} & {candidate.source for candidate in test}
    held_out = DigitsSource(*digit_files, hold_out_speaker="theo").candidates()
    assert {("theo" in candidate.source) for candidate in held_out if candidate.split == "train"} == {False}
    assert {("theo" in candidate.source) for candidate in held_out if candidate.split == "test"} == {True}


@pytest.mark.parametrize(
    ("codec", "size", "stored"),
    [
        ("h264", (1920, 1080), (448, 256)),
        ("h264", (720, 1281), (256, 448)),
        ("h264", (250, 250), (256, 256)),
        ("mjpeg", (1920, 1080), (456, 256)),
        ("vp9", (720, 1281), (256, 456)),
    ],
)
def test_h264_frames_consist_of_complete_macroblocks(codec: str, size: tuple[int, int], stored: tuple[int, int]):
    assert Encoding(codec, short_side=256).size_of(*size) == stored


@pytest.mark.parametrize(("codec", "side"), [("h264", 32), ("mjpeg", 40)])
def test_rendered_frames_have_a_size_that_the_codec_supports(codec: str, side: int):
    source = SyntheticSource(train_clips=2, test_clips=1)
    (clip,) = source.clips(source.candidates()[0], Encoding(codec, short_side=40, clip_s=0.5), np.random.default_rng(0))
    assert clip.size == (side, side)


@pytest.mark.parametrize("degrade", [False, True])
def test_digits_are_rendered_and_degraded(digit_files: list[Path], degrade: bool):
    source = DigitsSource(*digit_files, degrade=degrade)
    encoding = Encoding(short_side=40, clip_s=1, sample_rate_hz=8000)
    (clip,) = source.clips(source.candidates()[100], encoding, np.random.default_rng(0))
    assert clip.frames.shape == (8, 40, 40, 3) and clip.waveform.shape == (8000,)
    assert np.abs(clip.waveform).max() <= 1 and np.abs(clip.waveform).max() > 0.05
    background = np.median(clip.frames[0])
    assert (background > 5) == degrade


def test_a_directory_with_shards_of_an_unknown_dataset_is_rejected(tmp_path: Path):
    (tmp_path / "train-000000.tar").write_bytes(b"of another dataset")
    error = make_shards("synthetic", tmp_path, "--train-clips=6", "--test-clips=2", status=1).stderr
    assert "train-000000.tar belongs to another dataset, whose manifest.json is missing" in error
    assert (tmp_path / "train-000000.tar").read_bytes() == b"of another dataset"
