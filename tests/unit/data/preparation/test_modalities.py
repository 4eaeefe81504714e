"""make_shards.py --modalities any: datasets in which clips may lack video or audio."""

import csv
import gzip
import io
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import ShardReader
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encode_workers import EncodedClip, _encode_chunk, read_lists
from distav.data.preparation.encoding import Clip, ClipSource, Encoding
from distav.data.preparation.noise_injection import mismatch_pairs
from distav.data.preparation.output_dir import count_reasons, format_reasons, make_recipe
from distav.data.preparation.sources.annotated_videos import FeatureFolder
from distav.data.preparation.sources.digits import DigitsSource
from distav.data.preparation.sources.files import ClipList, VideoFolder
from distav.data.preparation.sources.llp import LLPSource
from distav.data.preparation.sources.split_patterns import SplitPattern
from distav.data.preparation.sources.tars import TarFiles
from distav.data.preparation.split_samples import draw_samples, noise_rates
from distav.tools.inspect_shards.verify import verify
from distav.tools.make_shards import main
from tests.helpers.events import STREAMS, write_llp
from tests.helpers.modalities import MODALITIES, OPTIONS, members_of, mixed_shards, write_mixed_folder

ANY = Encoding(modalities="any")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed_folder(tmp_path_factory.mktemp("mixed") / "files")


@pytest.fixture(scope="module")
def noisy(folder: Path) -> Path:
    """A dataset of the folder with mismatched pairs across classes."""
    return mixed_shards(folder, folder.parent / "noisy", "--correspondence-noise=0.5", "--cross-class-only")


def index_of(split: Split, sample: int, member: str) -> tuple[int, int, int]:
    offset, size, checksum = (int(split.columns[f"{member}_{name}"][sample]) for name in ("offset", "bytes", "crc32"))
    return offset, size, checksum


@pytest.mark.parametrize("codec", ["mjpeg", "h264", pytest.param("vp9", marks=pytest.mark.long)])
def test_a_sample_has_the_members_of_its_file_alone(codec: str, folder: Path, tmp_path: Path):
    out = mixed_shards(folder, tmp_path / "out", f"--codec={codec}", "--short-side=32")
    split = ShardedDataset.open(out).split("train")
    assert len(split) == 2 * 2 * len(MODALITIES)
    extensions = split.members
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(str(split.shards[0]), shardshuffle=False)}
    reader = ShardReader(split)
    for sample, key in enumerate(split.keys):
        members = members_of(split.sources[sample])
        files = {extensions[member] for member in members}
        assert {name for name in samples[key] if not name.startswith("__")} == {*files, "json"}
        metadata = json.loads(samples[key]["json"])
        assert set(metadata["sha256"]) == files and metadata["frames"] == (8 if "video" in members else 0)
        for member in ("video", "audio"):
            assert (index_of(split, sample, member) == (0, 0, 0)) == (member not in members)
        sizes = [int(split.columns[name][sample]) for name in ("frames", "width", "height")]
        assert (sizes == [0, 0, 0]) == ("video" not in members)
        frames, waveform = decode_clip(reader.read(sample))
        assert (frames is not None, waveform is not None) == ("video" in members, "audio" in members)
        assert frames is None or len(frames) == 8
        assert waveform is None or len(waveform) == 8000
    assert list(verify(out)) == []


def test_rejected_files_are_summarized_by_their_reasons(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["videos", str(folder), str(tmp_path / "both"), *OPTIONS]) == 3
    summary = capsys.readouterr().out
    assert "12 candidates rejected (4 no audio, 4 no video, 4 not a video); reasons in " in summary
    assert "--modalities any accepts clips without video or without audio" in summary
    rows = list(csv.DictReader((tmp_path / "both" / "rejected.csv").open()))
    assert sum("--modalities any" in row["reason"] for row in rows) == 8
    assert main(["videos", str(folder), str(tmp_path / "both"), *OPTIONS]) == 3  # The complete dataset is recognized.
    assert "(4 no audio, 4 no video, 4 not a video)" in capsys.readouterr().out
    mixed_shards(folder, tmp_path / "any")
    summary = capsys.readouterr().out
    assert "4 candidates rejected (4 not a video); reasons in" in summary and "--modalities" not in summary
    counts = {f"reason {index}": 9 - index for index in range(5)}
    assert format_reasons(counts) == "9 reason 0, 8 reason 1, 7 reason 2, 11 other"
    assert count_reasons([{"reason": "a: x"}, {"reason": "b"}, {"reason": "b: y"}]) == {"b": 2, "a": 1}


def test_the_recipe_contains_the_option_only_if_a_clip_may_lack_a_modality():
    source = VideoFolder(Path("a"))
    both = make_recipe(source, BuildConfig(Encoding()))
    assert "modalities" not in json.dumps(both)
    assert both["config"]["encoding"] == {
        "type": "Encoding", "codec": "mjpeg", "fps": 8.0, "short_side": 128, "clip_s": 2.0, "sample_rate_hz": 16000,
    }  # fmt: skip
    assert make_recipe(source, BuildConfig(ANY))["config"]["encoding"]["modalities"] == "any"
    tars = (SplitPattern("", "a.tar"),)
    assert "modalities" not in make_recipe(TarFiles(tars), BuildConfig(Encoding()))["source"]
    assert make_recipe(TarFiles(tars, modalities="any"), BuildConfig(ANY))["source"]["modalities"] == "any"
    with pytest.raises(UserError, match="--modalities=bth: allowed: both, any. Did you mean 'both'"):
        Encoding(modalities="bth")


def test_audio_is_swapped_only_between_clips_with_both_modalities(noisy: Path):
    shards = ShardedDataset.open(noisy)
    split = shards.split("train")
    complete = split.has_modality("visual") & split.has_modality("audio")
    rows = [row for row in pq.read_table(noisy / "labels.parquet").to_pylist() if row["split"] == "train"]
    pair_ids, labels = np.array([row["pair_id"] for row in rows]), [row["label"] for row in rows]
    swapped = np.flatnonzero(pair_ids != np.arange(len(split)))
    assert complete.sum() == 12 and len(swapped) == 6 and complete[swapped].all() and complete[pair_ids[swapped]].all()
    assert all(labels[sample] != labels[pair_ids[sample]] for sample in swapped)
    noise = shards.manifest["splits"]["train"]["noise"]
    assert noise == {"label_rate": 0.0, "swapped_audio_rate": 0.5, "cross_class_audio_rate": 0.5}
    assert list(verify(noisy)) == []


def encoded_clips(*members: set[str]) -> list[EncodedClip]:
    return [
        EncodedClip("f", f"s{index}", "ab"[index % 2], "train", 0.0, 0, 0, dict.fromkeys(sorted(names), (0, 1, 1)))
        for index, names in enumerate(members)
    ]


def test_noise_of_complete_clips_alone_draws_the_same_pairs():
    """The same random numbers are drawn as for a dataset in which all clips are complete."""
    config = BuildConfig(Encoding(), correspondence_noise=0.5)
    both = {"video", "audio"}

    def draw(clips: list[EncodedClip]):
        return draw_samples("train", clips, ["a", "b"], False, both, config, np.random.default_rng(0))

    samples = draw(encoded_clips(*[both] * 40))
    rng = np.random.default_rng(0)
    assert [clip.source for clip in samples.clips] == [f"s{index}" for index in rng.permutation(40)]
    np.testing.assert_array_equal(samples.audio_source, mismatch_pairs(40, 0.5, rng))
    assert samples.complete.all() and noise_rates(samples, False)["swapped_audio_rate"] == 0.5
    mixed = draw(encoded_clips(*[both, {"audio"}, {"video"}, both] * 10))
    assert noise_rates(mixed, False)["swapped_audio_rate"] == 0.5 and mixed.complete.sum() == 20
    with pytest.raises(UserError, match="--correspondence-noise=0.5: none of the 4 training clips has both video and"):
        draw(encoded_clips(*[{"audio"}] * 4))
    assert noise_rates(
        draw_samples("test", encoded_clips({"audio"}), ["a"], False, both, config, np.random.default_rng(0)), False
    ) == {"label_rate": 0.0}


def test_a_cleaned_dataset_keeps_the_members_that_a_clip_has(noisy: Path, tmp_path: Path):
    old = ShardedDataset.open(noisy).split("train")
    removed = old.keys[[0, int(np.flatnonzero(~old.has_modality("visual"))[0])]].tolist()
    decisions = tmp_path / "decisions.csv"
    decisions.write_text("key,label,pair\n" + "".join(f"{key},,mismatched\n" for key in dict.fromkeys(removed)))
    out = tmp_path / "clean"
    assert main(["clean", str(noisy), str(out), f"--decisions={decisions}"]) == 3
    new = ShardedDataset.open(out).split("train")
    kept = np.flatnonzero(~np.isin(old.keys, removed))
    assert new.keys.tolist() == old.keys[kept].tolist()
    for column in ("frames", "width", "video_bytes", "audio_bytes", "video_crc32", "audio_crc32"):
        np.testing.assert_array_equal(new.columns[column], old.columns[column][kept])
    assert list(verify(out)) == []


def test_lists_accept_files_of_all_modalities(folder: Path, tmp_path: Path):
    table = tmp_path / "clips.csv"
    names = ["silent-0.mkv", "audio-0.wav", "cover.mp3", "both-0.mp4"]
    table.write_text("path,label,start_s,end_s\n" + "".join(f"{folder}/cat/{name},cat,1,2\n" for name in names))
    source, encoding = ClipList(table), Encoding(clip_s=1, modalities="any")
    for candidate in source.candidates():
        (clip,) = source.clips(candidate, encoding, np.random.default_rng(0))
        assert set(clip.members(encoding)) == members_of(candidate.source)


def test_sources_with_fixed_modalities_reject_other_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["synthetic", str(tmp_path / "out"), "--modalities=any"]) == 1
    error = "--modalities=any: allowed for this source: both, because all its samples have both modalities"
    assert error in capsys.readouterr().err and not (tmp_path / "out").exists()
    write_llp(tmp_path / "llp")
    streams = tuple(
        FeatureFolder(modality, name, tmp_path / "llp" / name) for name, (modality, _, _) in STREAMS.items()
    )
    config = BuildConfig(Encoding(clip_s=10, modalities="any"))
    with pytest.raises(UserError, match=error):
        build_dataset(LLPSource(tmp_path / "llp", None, streams), tmp_path / "out", config, 1)
    assert LLPSource(tmp_path / "llp", tmp_path).allowed_modalities == ("both", "any")


@dataclass(frozen=True)
class OneModality:
    """A source of another package that yields audio alone, whatever the option is."""

    def candidates(self) -> list[ClipSource]:
        return [ClipSource(f"tone-{index}", "tone", "train") for index in range(3)]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        yield Clip(None, np.full(encoding.num_audio_samples, 0.5, np.float32))


def test_clips_of_any_source_may_lack_a_modality_only_with_the_option(tmp_path: Path):
    source = OneModality()
    for encoding, num_clips in ((Encoding(), 0), (ANY, 3)):
        work_dir = tmp_path / encoding.modalities
        work_dir.mkdir()
        _encode_chunk(source, encoding, 0, 0, source.candidates(), work_dir)
        encoded, rejected = read_lists(work_dir, [0])
        assert [set(clip.members) for clip in encoded] == [{"audio"}] * num_clips
        assert len(rejected) == 3 - num_clips and all("--modalities any accepts" in row["reason"] for row in rejected)


def idx_file(path: Path, values: np.ndarray) -> Path:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    return path


def test_truncated_files_of_digits_are_reported(tmp_path: Path):
    images = idx_file(tmp_path / "images.gz", np.random.default_rng(0).integers(0, 255, (20, 28, 28)))
    labels = idx_file(tmp_path / "labels.gz", np.arange(20) % 10)
    wav = io.BytesIO()
    soundfile.write(wav, np.random.default_rng(0).uniform(-1, 1, 4000), 8000, format="WAV")
    archives = [tmp_path / name for name in ("a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2")]
    for path in archives:
        with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as tar:
            for name in ("3_theo_5.wav", "4_theo_6.wav"):
                entry = tarfile.TarInfo(name)
                entry.size = len(wav.getvalue())
                tar.addfile(entry, io.BytesIO(wav.getvalue()))
        assert len(DigitsSource(images, labels, path).candidates()) == 2
    for path in archives:
        cut = tmp_path / f"cut-{path.name}"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
        with pytest.raises(UserError, match=f"--recordings .*cut-{path.name}: not a readable tar archive, or trunc"):
            DigitsSource(images, labels, cut).candidates()
    for content in (images.read_bytes()[:-20], images.read_bytes()[:5000], b"\x1f\x8bnot gzip", b"\x1f\x8b"):
        cut = tmp_path / f"cut-{len(content)}.gz"
        cut.write_bytes(content)
        with pytest.raises(UserError, match=r"cut-\d+.gz: truncated or damaged gzip file"):
            DigitsSource(cut, labels, archives[0]).candidates()


def test_a_dataset_is_written_neither_to_a_url_nor_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("content")
    for out, reason in (("s3://bucket/dataset", "is a URL"), (str(tmp_path / "file"), "is a file")):
        with pytest.raises(SystemExit) as stopped:
            main(["synthetic", out])
        assert stopped.value.code == 2 and f"{out} {reason}" in capsys.readouterr().err
