"""Several classes per clip in CSV lists, tars and Parquet tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Encoding, RejectedClip
from distav.data.preparation.multi_label_noise import ClassRates
from distav.data.preparation.output_dir import make_recipe
from distav.data.preparation.sources.files import ClipList
from distav.data.preparation.sources.parquet import ParquetFiles
from distav.data.preparation.sources.sample_labels import parse_labels
from distav.data.preparation.sources.split_patterns import SplitPattern
from distav.data.preparation.sources.synthetic import SyntheticSource
from distav.data.preparation.sources.synthetic_multi import SyntheticMultiSource
from distav.tools.make_shards import main


def write_list(folder: Path, content: str) -> Path:
    path = folder / "clips.csv"
    path.write_text(content)
    return path


@pytest.mark.parametrize("separator", ["|", ";"])
def test_labels_with_a_separator_are_lists(tmp_path: Path, separator: str):
    path = write_list(tmp_path, f"path,label\na.mp4,dog {separator} rain\nb.mp4,dog\nc.mp4,cat{separator}dog\n")
    source = ClipList(path, label_separator=separator)
    assert [candidate.label for candidate in source.candidates()] == ["dog|rain", "dog", "cat|dog"]
    assert source.info().classes == ["cat", "dog", "rain"] and source.info().multi_label
    assert not ClipList(path).info().multi_label and ClipList(path).info().classes is None


def test_repeated_rows_are_the_classes_of_a_clip(tmp_path: Path):
    rows = "a.mp4,dog,0,2\nb.mp4,cat,0,2\na.mp4,rain,0,2\na.mp4,cat,2,4\n"
    source = ClipList(write_list(tmp_path, f"path,label,start_s,end_s\n{rows}"), repeated_rows=True)
    assert [(candidate.source, candidate.start_s, candidate.label) for candidate in source.candidates()] == [
        ("a.mp4", 0, "dog|rain"),
        ("b.mp4", 0, "cat"),
        ("a.mp4", 2, "cat"),
    ]
    assert source.info().classes == ["cat", "dog", "rain"]


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"label_separator": "|"}, "a.mp4,dog|dog,", r"line 2: label 'dog\|dog' has the class 'dog' twice; keep one"),
        ({"label_separator": "|"}, "a.mp4,dog|,", r"line 2: label 'dog\|' has an empty name"),
        ({"label_separator": "|"}, "a.mp4,dog;cat,", "line 2: class name 'dog;cat' contains ';'; the names of a clip"),
        ({"label_separator": ";"}, "a.mp4,,", "line 2: label is empty"),
        ({"repeated_rows": True}, "a.mp4,dog,\na.mp4,dog,", "line 3: the clip has the class 'dog' already, see line 2"),
        (
            {"repeated_rows": True},
            "a.mp4,dog,\na.mp4,cat,test",
            "line 3: the clip is in split test, but in split train",
        ),
        ({"repeated_rows": True}, "a.mp4,dog;cat,", "line 2: label 'dog;cat' contains ';'.*--label-separator ';'"),
    ],
)
def test_invalid_lists_are_rejected(tmp_path: Path, options: dict, rows: str, message: str):
    path = write_list(tmp_path, f"path,label,split\n{rows}\n")
    with pytest.raises(UserError, match=message):
        ClipList(path, **options).candidates()


def test_other_separators_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["csv", str(tmp_path / "clips.csv"), str(tmp_path / "out"), "--label-separator", "/"])
    assert "--label-separator: '/': allowed: |, ;" in capsys.readouterr().err


def test_parquet_labels_may_be_texts_with_a_separator(tmp_path: Path):
    columns = {"video": ["a.mp4", "b.mp4"], "label": ["dog; rain", "dog;dog"]}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    source = ParquetFiles((SplitPattern.parse(str(tmp_path / "set.parquet")),), label_separator=";")
    assert [candidate.label for candidate in source.candidates()] == ["dog|rain", ""]
    assert source.info().multi_label
    with pytest.raises(RejectedClip, match="repeated label: 'dog' occurs twice in the list"):
        parse_labels(["dog", "dog"])
    with pytest.raises(RejectedClip, match="no label: empty"):
        parse_labels("dog||rain", separator="|")


def test_noise_needs_the_right_number_of_labels_per_clip(tmp_path: Path):
    lists = BuildConfig(Encoding(), missing_labels=ClassRates(0.1, 0.1))
    with pytest.raises(UserError, match="--missing-labels and --wrong-labels need a source with several classes"):
        build_dataset(SyntheticSource(4, 0), tmp_path / "single", lists, workers=1)
    with pytest.raises(UserError, match="one class per sample.*Use --missing-labels and --wrong-labels"):
        build_dataset(SyntheticMultiSource(4, 0), tmp_path / "multi", BuildConfig(Encoding(), cross_class_only=True), 1)


def test_recipes_of_single_label_datasets_are_unchanged(tmp_path: Path):
    recipe = make_recipe(ClipList(tmp_path / "clips.csv"), BuildConfig(Encoding()))
    assert recipe["source"].keys() == {"type", "file", "splits"}
    assert not {"missing_labels", "wrong_labels"} & recipe["config"].keys()
