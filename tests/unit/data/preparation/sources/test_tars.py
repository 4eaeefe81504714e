"""WebDataset tar files of other tools as a source."""

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.sources.split_patterns import SplitPattern
from distav.data.preparation.sources.tars import TarFiles
from distav.tools.make_shards import main
from tests.helpers.media import copy_stream, event_times, write_audio, write_media
from tests.helpers.stores import web

ENCODING = Encoding(fps=10, short_side=16, clip_s=1.0, sample_rate_hz=8000)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_media(tmp_path_factory.mktemp("media") / "clip.mp4", 2.0).read_bytes()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def source_of(*patterns: object, **options) -> TarFiles:
    return TarFiles(tuple(SplitPattern.parse(str(pattern)) for pattern in patterns), **options)


def faults_of(candidates: list[ClipSource]) -> dict[str, str]:
    return {
        Path(candidate.source).name: str(candidate.detail[1]).split(":")[0]
        for candidate in candidates
        if not candidate.detail[0]
    }


def clips_of(source: TarFiles, candidate: ClipSource, modalities: str = "both") -> list[Clip]:
    encoding = replace(ENCODING, modalities=modalities)
    return [clip for clip in source.clips(candidate, encoding, np.random.default_rng(0)) if isinstance(clip, Clip)]


def test_tars_become_a_dataset_with_splits_and_lists_of_labels(
    video: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number, labels in enumerate((["dog", "Speech, male"], ["dog"])):
        text = json.dumps({"meta": {"tags": labels}}).encode()
        write_tar(tmp_path / f"set-{number}.tar", [("000.mp4", video), ("000.json", text), ("001.json", text)])
    out = tmp_path / "out"
    patterns = [f"{tmp_path}/set-0.tar", f"test={tmp_path}/set-{{1..1}}.tar"]
    options = ["--label=json:meta.tags", "--clip-s=1", "--short-side=16", "--fps=10", "--workers=1"]
    assert main(["tars", *patterns, str(out), *options]) == 3
    assert "tars: 2 of 4 samples cannot be used: 2 no video" in capsys.readouterr().err
    shards = ShardedDataset.open(out)
    assert shards.classes == ["Speech, male", "dog"] and shards.multi_label
    assert (len(shards.split("train")), len(shards.split("test"))) == (2, 2)
    labels = pq.read_table(out / "labels.parquet").to_pylist()
    assert {tuple(row["label"]) for row in labels if row["split"] == "train"} == {("dog", "Speech, male")}
    rejected = list(csv.DictReader((out / "rejected.csv").open()))
    assert [Path(row["path"]).name for row in rejected] == ["001", "001"]


def test_labels_are_read_from_text_and_json_members(video: bytes, tmp_path: Path):
    members = [("a.mp4", video), ("a.cls", b"1\n"), ("a.txt", b"rain\n"), ("a.json", b'{"k": 0, "list": ["x", "y"]}')]
    tar = write_tar(tmp_path / "set.tar", members)
    for label, names, expected in (
        ("cls", (), "1"),
        ("cls", ("dog", "cat"), "cat"),
        ("txt", (), "rain"),
        ("json:k", ("dog", "cat"), "dog"),
        ("json:list", (), "x|y"),
    ):
        (candidate,) = source_of(tar, label=label, class_names=names).candidates()
        assert candidate.label == expected
    first = source_of(tar, label="json:list", first_label=True)
    assert first.candidates()[0].label == "x" and not first.info().multi_label
    assert source_of(tar, label="json:list").info().multi_label
    assert source_of(tar, class_names=("dog", "cat")).info().classes == ["dog", "cat"]
    for label in ("json:none", "json:list.x"):
        with pytest.raises(UserError, match="no label: json has no key"):
            source_of(tar, label=label).candidates()
    with pytest.raises(UserError, match="--label=jsn:k: allowed: cls, txt, or json:KEY"):
        source_of(tar, label="jsn:k").candidates()


def test_unusable_samples_are_listed_with_a_reason(video: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tar = write_tar(
        tmp_path / "set.tar",
        [
            ("good.mp4", video), ("good.cls", b"0"),
            ("split.mp4", video), ("between.mp4", video), ("between.cls", b"0"), ("split.cls", b"0"),
            ("unlabeled.mp4", video),
            ("audio.wav", b"RIFF"), ("audio.cls", b"0"),
            ("twice.mp4", video), ("twice.mp4", video), ("twice.cls", b"0"),
            ("dots.b.mp4", video), ("dots.b.cls", b"0"),
        ],
    )  # fmt: skip
    candidates = source_of(tar).candidates()
    assert faults_of(candidates) == {
        "split": "not adjacent",
        "unlabeled": "no label",
        "audio": "no video",
        "twice": "duplicate",
        "dots": "no video",
    }
    assert (
        "6 of 8 samples cannot be used: 2 not adjacent, 2 no video, 1 no label, 1 duplicate" in capsys.readouterr().err
    )
    assert any("use --key-to-last-dot" in str(candidate.detail[1]) for candidate in candidates)
    usable = [candidate.source for candidate in source_of(tar, key_to_last_dot=True).candidates() if candidate.label]
    assert [Path(name).name for name in usable] == ["good", "between", "dots.b"]


def test_reading_continues_after_damage(video: bytes, tmp_path: Path):
    members = [(f"{number}.{extension}", content) for number in range(4) for extension, content in
               (("mp4", video), ("cls", b"0"))]  # fmt: skip
    content = bytearray(write_tar(tmp_path / "damaged.tar", members).read_bytes())
    with tarfile.open(tmp_path / "damaged.tar") as tar:
        offsets = [entry.offset for entry in tar]
    content[offsets[2] : offsets[2] + 512] = b"\xff" * 512
    (tmp_path / "damaged.tar").write_bytes(content)
    (tmp_path / "truncated.tar").write_bytes(content[: offsets[6] + 1000])
    (tmp_path / "gzip.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    source = source_of(tmp_path / "{damaged,truncated,gzip,gone}.tar")
    candidates = source.candidates()
    assert [Path(candidate.source).name for candidate in candidates if candidate.label] == ["0", "2", "3", "0", "2"]
    faults = [str(candidate.detail[1]) for candidate in candidates if not candidate.detail[0]]
    assert any(fault == "truncated: the tar ends within 3.mp4" for fault in faults)
    assert any(fault.startswith(f"damaged: no valid header at byte {offsets[2]}, ") for fault in faults)
    assert any(fault.startswith("not a tar: compressed by gzip") for fault in faults)
    assert any(fault == "not readable: No such file or directory" for fault in faults)
    flashes, _ = event_times(clips_of(source, candidates[2]), ENCODING)
    assert flashes == [1.0]


@pytest.mark.parametrize(
    ("size", "file_type"), [(1 << 64, tarfile.REGTYPE), (1 << 64, tarfile.XHDTYPE), (-1024, tarfile.REGTYPE)]
)
def test_a_member_with_an_impossible_size_is_reported(video: bytes, tmp_path: Path, size: int, file_type: bytes):
    tar = write_tar(tmp_path / "set.tar", [("a.mp4", video), ("a.cls", b"0")])
    entry = tarfile.TarInfo("b.mp4")
    entry.size, entry.type = size, file_type
    content = tar.read_bytes()
    end = 1024 + -(-len(video) // 512) * 512 + 512
    tar.write_bytes(content[:end] + entry.tobuf(tarfile.GNU_FORMAT) + content[end:])
    candidates = source_of(tar).candidates()
    assert Path(candidates[0].source).name == "a" and candidates[0].label == "0"
    assert list(faults_of(candidates).values()) in (["truncated"], ["damaged"])


def test_a_tar_without_usable_samples_is_an_error(video: bytes, tmp_path: Path):
    tar = write_tar(tmp_path / "set.tar", [("a.mp4", video)])
    with pytest.raises(UserError, match=r"no sample can be used \(1 no label\)"):
        source_of(tar).candidates()
    with pytest.raises(UserError, match="no such file"):
        source_of(tmp_path / "none-*.tar").candidates()


def test_audio_members_are_used_for_videos_without_audio(video: bytes, tmp_path: Path):
    (tmp_path / "video.mkv").write_bytes(video)
    silent = copy_stream(tmp_path / "video.mkv", tmp_path / "silent.mkv", "video")
    audio = write_media(tmp_path / "audio.mkv", 2.0).read_bytes()
    members = [("a.mkv", silent.read_bytes()), ("a.ogg", audio), ("a.cls", b"0")]
    source = source_of(write_tar(tmp_path / "set.tar", members))
    clips = clips_of(source, source.candidates()[0])
    flashes, beeps = event_times(clips, ENCODING)
    assert flashes == [1.0] and beeps == pytest.approx([1.0], abs=0.05)


def test_samples_with_audio_alone_are_used_if_a_modality_may_be_missing(
    video: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    members = [("both.mp4", video), ("both.cls", b"0")]
    for number, suffix in enumerate((".wav", ".flac", ".mp3")):
        content = write_audio(tmp_path / f"audio{suffix}", 2.0, cover=suffix == ".mp3").read_bytes()
        members += [(f"{number}{suffix}", content), (f"{number}.cls", b"0")]
    members += [("none.jpg", b"x"), ("none.cls", b"0")]
    tar = write_tar(tmp_path / "set.tar", members)
    options = ["--clip-s=1", "--short-side=16", "--fps=10", "--workers=1"]
    assert main(["tars", str(tar), str(tmp_path / "both"), *options]) == 3
    reasons = [row["reason"] for row in csv.DictReader((tmp_path / "both" / "rejected.csv").open())]
    accepted = [reason.endswith("--modalities any accepts clips without video or without audio") for reason in reasons]
    assert all(reason.startswith("no video: ") for reason in reasons) and accepted == [True] * 3 + [False]
    capsys.readouterr()
    assert main(["tars", str(tar), str(tmp_path / "any"), *options, "--modalities=any"]) == 3
    assert "1 of 5 samples cannot be used: 1 no video or audio" in capsys.readouterr().err
    split = ShardedDataset.open(tmp_path / "any").split("train")
    assert split.has_modality("audio").all() and split.has_modality("visual").sum() == 2 and len(split) == 8
    (tmp_path / "alone").mkdir()
    alone = write_tar(tmp_path / "alone" / "set.tar", members[2:4])
    with pytest.raises(UserError, match=r"no sample can be used \(1 no video\).*--modalities any accepts"):
        source_of(alone).candidates()
    source = source_of(alone, modalities="any")
    _, beeps = event_times(clips_of(source, source.candidates()[0], modalities="any"), ENCODING)
    assert beeps == pytest.approx([1.0], abs=0.05)
    damaged = write_tar(tmp_path / "alone" / "damaged.tar", [("0.mp4", video[:500]), *members[2:4]])
    source = source_of(damaged, modalities="any")
    clips = clips_of(source, source.candidates()[0], modalities="any")
    assert len(clips) == 2 and all(clip.frames is None and clip.waveform is not None for clip in clips)
    assert clips[0].repairs[0].startswith("video: left out, the video file cannot be opened (")
    with pytest.raises(RejectedClip, match="^truncated"):
        clips_of(source_of(damaged), source_of(damaged).candidates()[0])


def test_a_url_that_cannot_be_read_is_reported_by_the_name_of_its_argument():
    with pytest.raises(UserError, match="tars ftp://host/a-1.tar: allowed: paths, and URLs with s3, gs"):
        source_of("ftp://host/a-{1..2}.tar").candidates()
    with pytest.raises(UserError, match=r"^PATTERN=s3://\.\.\.: allowed: s3://bucket/directory, without a query"):
        source_of("s3://user@host/a.tar").candidates()


def test_tars_are_read_from_a_web_server(video: bytes, tmp_path: Path):
    write_tar(tmp_path / "set-0.tar", [("a.mp4", video), ("a.cls", b"0")])
    with web(tmp_path) as server:
        source = source_of(f"{server.url}/set-{{0..1}}.tar")
        candidates = source.candidates()
        assert faults_of(candidates) == {"set-1.tar": "not readable"}
        assert len(clips_of(source, candidates[0])) == 2
