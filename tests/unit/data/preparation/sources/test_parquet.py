"""Parquet tables in the layout of the Hugging Face Hub as a source."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.sources.parquet import ParquetFiles
from distav.data.preparation.sources.split_patterns import SplitPattern
from distav.tools.make_shards import main
from tests.helpers.media import copy_stream, event_times, write_audio, write_media

ENCODING = Encoding(fps=10, short_side=16, clip_s=1.0, sample_rate_hz=8000)
NAMES = {"names": ["dog", "rain"], "_type": "ClassLabel"}
MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_media(tmp_path_factory.mktemp("media") / "clip.mp4", 2.0).read_bytes()


def write_hub_table(path: Path, columns: dict[str, Any], features: dict[str, Any], rows_per_group: int = 2) -> Path:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=rows_per_group)
    return path


def source_of(*patterns: object, **options) -> ParquetFiles:
    return ParquetFiles(tuple(SplitPattern.parse(str(pattern)) for pattern in patterns), **options)


def clips_of(source: ParquetFiles, candidate: ClipSource) -> list[Clip]:
    return [clip for clip in source.clips(candidate, ENCODING, np.random.default_rng(0)) if isinstance(clip, Clip)]


def test_a_table_of_the_hub_becomes_a_dataset(video: bytes, tmp_path: Path):
    videos = pa.array([{"bytes": video, "path": "a.mp4"}] * 3 + [{"bytes": None, "path": None}], MEDIA)
    columns = {"video": videos, "label": [0, 1, -1, 1]}
    for split in ("train", "test"):
        write_hub_table(tmp_path / f"{split}-00000-of-00001.parquet", columns, {"label": NAMES})
    out = tmp_path / "out"
    options = ["--clip-s=1", "--short-side=16", "--fps=10", "--workers=1"]
    assert main(["parquet", f"{tmp_path}/*.parquet", str(out), *options]) == 3
    shards = ShardedDataset.open(out)
    assert shards.classes == ["dog", "rain"] and not shards.multi_label
    assert (len(shards.split("train")), len(shards.split("test"))) == (4, 4)
    rejected = (out / "rejected.csv").read_text()
    assert rejected.count("no label: -1; allowed: 0 to 1") == 2
    assert rejected.count("missing: column video is empty") == 2


def test_rows_are_found_in_all_row_groups(video: bytes, tmp_path: Path):
    other = write_media(tmp_path / "other.mp4", 3.0).read_bytes()
    videos = pa.array([{"bytes": content, "path": "a.mp4"} for content in (video, video, video, other, video)], MEDIA)
    source = source_of(write_hub_table(tmp_path / "set.parquet", {"video": videos, "label": [0] * 5}, {}))
    candidates = source.candidates()
    assert {candidate.split for candidate in candidates} == {"train"} and candidates[0].label == "0"
    for position in (0, 1, 3, 4, 2, 3):
        assert len(clips_of(source, candidates[position])) == (3 if position == 3 else 2)


@pytest.mark.parametrize(
    "feature", [{"feature": NAMES, "_type": "Sequence"}, {"feature": NAMES, "_type": "List"}, [NAMES]]
)
def test_lists_of_labels_have_the_names_of_the_schema(feature: object, tmp_path: Path):
    columns = {"video": ["a.mp4", "b.mp4"], "label": [[1, 0], [1]]}
    source = source_of(write_hub_table(tmp_path / "set.parquet", columns, {"label": feature}))
    assert [candidate.label for candidate in source.candidates()] == ["rain|dog", "rain"]
    assert source.info().multi_label and source.info().classes == ["dog", "rain"]
    first = source_of(tmp_path / "set.parquet", first_label=True)
    assert [candidate.label for candidate in first.candidates()] == ["rain", "rain"]
    assert not first.info().multi_label


def test_string_paths_are_relative_to_the_table(video: bytes, tmp_path: Path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(video)
    columns = {"file": ["clips/a.mp4", "clips/b.mp4"], "category": ["rain", "dog"]}
    table = write_hub_table(tmp_path / "set.parquet", columns, {})
    source = source_of(f"val={table}", video="file", label="category")
    candidates = source.candidates()
    assert [(candidate.source, candidate.label, candidate.split) for candidate in candidates] == [
        ("clips/a.mp4", "rain", "val"),
        ("clips/b.mp4", "dog", "val"),
    ]
    assert event_times(clips_of(source, candidates[0]), ENCODING)[0] == [1.0]
    with pytest.raises(RejectedClip, match="missing: no such file"):
        clips_of(source, candidates[1])


def test_tables_with_audio_alone_are_used_if_a_modality_may_be_missing(video: bytes, tmp_path: Path):
    audio = write_audio(tmp_path / "a.wav", 2.0).read_bytes()
    cell = {"bytes": audio, "path": "a.wav"}
    table = {"audio": pa.array([cell, {"bytes": None, "path": None}], MEDIA), "label": [0, 1]}
    write_hub_table(tmp_path / "train-00000-of-00001.parquet", table, {"label": NAMES})
    path = tmp_path / "train-00000-of-00001.parquet"
    options = ["--clip-s=1", "--short-side=16", "--fps=10", "--workers=1"]
    with pytest.raises(UserError, match=r"no column 'video'; .* For audio without video: --modalities any\."):
        source_of(path).candidates()
    assert main(["parquet", str(path), str(tmp_path / "alone"), *options, "--modalities=any"]) == 3
    split = ShardedDataset.open(tmp_path / "alone").split("train")
    assert len(split) == 2 and split.has_modality("audio").all() and not split.has_modality("visual").any()

    copy_stream(write_media(tmp_path / "b.mkv", 2.0), tmp_path / "silent.mkv", "video")
    columns = {
        "video": ["silent.mkv", None, "silent.mkv", "b.mkv"], "audio": ["a.wav", "a.wav", None, None], "label": [0] * 4,
    }  # fmt: skip
    path = write_hub_table(tmp_path / "mixed.parquet", columns, {})
    source = source_of(path, modalities="any")
    assert [candidate.source for candidate in source.candidates()] == ["silent.mkv", "a.wav", "silent.mkv", "b.mkv"]
    encoding = replace(ENCODING, modalities="any")
    clips = [next(source.clips(candidate, encoding, np.random.default_rng(0))) for candidate in source.candidates()]
    members = [set(clip.members(encoding)) for clip in clips]
    assert members == [{"video", "audio"}, {"audio"}, {"video"}, {"video", "audio"}]
    with pytest.raises(RejectedClip, match="missing: column video is empty; --modalities any accepts"):
        clips_of(source_of(path), source_of(path).candidates()[1])


def test_errors_name_file_and_column(tmp_path: Path):
    table = write_hub_table(tmp_path / "set.parquet", {"video": ["a"], "label": [0]}, {"label": NAMES})
    with pytest.raises(UserError, match=r"set.parquet: no column 'category'; allowed: video, label"):
        source_of(table, label="category").candidates()
    with pytest.raises(UserError, match=r"column 'label' has type int64; allowed: string paths"):
        source_of(table, video="label").candidates()
    with pytest.raises(UserError, match="none.parquet: no such file"):
        source_of(tmp_path / "none.parquet").candidates()
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(UserError, match="text.parquet: cannot be read"):
        source_of(tmp_path / "text.parquet").candidates()
    write_hub_table(tmp_path / "without.parquet", {"video": ["a"], "label": [0]}, {})
    with pytest.raises(UserError, match="the class names of column label differ from those of"):
        source_of(table, tmp_path / "without.parquet").candidates()


@pytest.mark.parametrize("column_type", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_column_may_have_contents_without_paths(column_type: pa.DataType, video: bytes, tmp_path: Path):
    pq.write_table(pa.table({"video": pa.array([video], column_type), "label": [0]}), tmp_path / "set.parquet")
    source = source_of(tmp_path / "set.parquet")
    assert len(clips_of(source, source.candidates()[0])) == 2


def test_paths_may_be_stored_in_any_type_of_text(video: bytes, tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(video)
    paths = pa.array(["a.mp4", "a.mp4"])
    columns = paths.dictionary_encode(), paths.cast(pa.string_view()), paths.cast(pa.large_string())
    for number, column in enumerate(columns):
        path = tmp_path / f"set-{number}.parquet"
        pq.write_table(pa.table({"video": column, "label": [0, 1]}), path)
        source = source_of(path)
        candidates = source.candidates()
        assert [candidate.source for candidate in candidates] == ["a.mp4"] * 2
        assert len(clips_of(source, candidates[1])) == 2
