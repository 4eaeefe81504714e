"""Decisions on the labels of multi-label clips, and cleaned multi-label datasets."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.data.annotations.multi_labels import load_multi_labels
from distav.data.dataset import ShardedDataset
from distav.data.preparation.cleaning import CleaningConfig, clean_dataset
from distav.data.preparation.multi_label_noise import ClassRates
from distav.tools.inspect_shards.verify import verify
from tests.helpers.multi_label import multi_label_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    out = tmp_path_factory.mktemp("multi") / "shards"
    return ShardedDataset.open(multi_label_shards(out, 24, 6, ClassRates(0.3, 0.3), ClassRates(0.1, 0.1)))


def write_decisions(folder: Path, rows: list[tuple[str, str, str]], name: str = "decisions") -> Path:
    path = folder / f"{name}.csv"
    path.write_text("key,class,decision\n" + "".join(f"{','.join(row)}\n" for row in rows))
    return path


def cleaned(config: CleaningConfig, out: Path) -> tuple[np.ndarray, dict]:
    clean_dataset(config, out, workers=1)
    dataset = ShardedDataset.open(out)
    assert list(verify(out)) == []
    return load_multi_labels(dataset, dataset.split("train")).given, dataset.manifest


def test_decisions_change_the_lists_of_their_clips(shards: ShardedDataset, tmp_path: Path):
    split, classes = shards.split("train"), shards.classes
    labels = load_multi_labels(shards, split)
    expected, rows = labels.given.copy(), []
    for sample, column, decision in ((0, 0, "add"), (0, 1, "remove"), (1, 2, "keep"), (2, 3, "")):
        rows.append((str(split.keys[sample]), classes[column], decision))
        if decision in ("add", "remove"):
            expected[sample, column] = decision == "add"
    config = CleaningConfig(shards.root, (write_decisions(tmp_path, rows),))
    given, manifest = cleaned(config, tmp_path / "clean")
    assert np.array_equal(given, expected)
    assert manifest["num_relabeled"] == (expected != labels.given).any(1).sum() and manifest["multi_label"]
    noise = manifest["splits"]["train"]["noise"]
    assert labels.true is not None
    assert noise["missing_label_rate"] == pytest.approx((labels.true & ~expected).sum() / labels.true.sum())


def test_posteriors_of_a_run_replace_labels_and_decisions_take_precedence(shards: ShardedDataset, tmp_path: Path):
    split, classes = shards.split("train"), shards.classes
    given = load_multi_labels(shards, split).given
    posterior = np.where(given, 0.95, 0.05)
    posterior[0], posterior[1, 0], posterior[1, 1] = [0.97] * 6, 0.6, 0.4
    table = pa.table({"key": split.keys, "posterior": pa.array(list(posterior), pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / "run.parquet")
    decisions = write_decisions(tmp_path, [(str(split.keys[0]), classes[2], "remove")])
    config = CleaningConfig(shards.root, (decisions,), tmp_path / "run.parquet", 0.9)
    reviewed, _ = cleaned(config, tmp_path / "clean")
    assert reviewed[0].tolist() == [True, True, False, True, True, True]
    assert np.array_equal(reviewed[1:], given[1:])


def test_majority_of_several_reviewers_decides(shards: ShardedDataset, tmp_path: Path):
    key, classes = str(shards.split("train").keys[0]), shards.classes
    given = load_multi_labels(shards, shards.split("train")).given[0]
    change = "remove" if given[0] else "add"
    votes = [[(key, classes[0], change)], [(key, classes[0], change)], [(key, classes[0], "keep")]]
    files = tuple(write_decisions(tmp_path, rows, f"reviewer{index}") for index, rows in enumerate(votes))
    reviewed, manifest = cleaned(CleaningConfig(shards.root, files), tmp_path / "clean")
    assert reviewed[0, 0] != given[0] and np.array_equal(reviewed[0, 1:], given[1:])
    (conflict,) = manifest["review"]["conflicts"]
    assert conflict["key"] == key and conflict["column"] == classes[0]
    run = pa.table({"key": [key], "posterior": pa.array([np.where(given, 0.0, 1.0)], pa.list_(pa.float64()))})
    pq.write_table(run, tmp_path / "run.parquet")
    tie, _ = cleaned(CleaningConfig(shards.root, files[1:], tmp_path / "run.parquet"), tmp_path / "tie")
    assert tie[0, 0] == given[0] and np.array_equal(tie[0, 1:], ~given[1:])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{key},dgo,add"], "line 2: unknown class 'dgo'; .*Did you mean 'dog'"),
        (["{key},dog,ad"], "line 2: decision 'ad'; allowed: add, remove, keep, or empty. Did you mean 'add'"),
        (["{key},dog,add", "{key},rain,add", "{key},dog,keep"], "line 4: class 'dog' of train-000000000 is decided in"),
        (["x,dog,add"], r"does not have the samples of 1 of 1 rows: x \(line 2\)"),
    ],
)
def test_invalid_decisions_are_rejected(shards: ShardedDataset, tmp_path: Path, rows: list[str], message: str):
    key = str(shards.split("train").keys[0])
    path = write_decisions(tmp_path, [tuple(row.format(key=key).split(",")) for row in rows])
    with pytest.raises(UserError, match=message):
        clean_dataset(CleaningConfig(shards.root, (path,)), tmp_path / "clean", workers=1)


def test_options_that_need_one_label_are_rejected(shards: ShardedDataset, tmp_path: Path):
    path = write_decisions(tmp_path, [])
    config = CleaningConfig(shards.root, (path,), min_correspondence=0.5)
    with pytest.raises(UserError, match="--min-correspondence=0.5: mismatched pairs are not estimated"):
        clean_dataset(config, tmp_path / "clean", workers=1)
    with pytest.raises(UserError, match="--min-confidence=0.2: allowed on .* several classes: 0.5 to 1"):
        clean_dataset(CleaningConfig(shards.root, (path,), min_confidence=0.2), tmp_path / "clean", workers=1)
    one = tmp_path / "one.csv"
    one.write_text("key,label,confidence\nx,dog,1\n")
    for config in (CleaningConfig(shards.root, (one,)), CleaningConfig(shards.root, labels=one)):
        with pytest.raises(UserError, match="is missing; the table is of a dataset with one label per clip, .*; use "):
            clean_dataset(config, tmp_path / "clean", workers=1)
    keys = shards.split("train").keys
    single = pa.table({"key": keys, "posterior": [0.5] * len(keys)})
    pq.write_table(single, tmp_path / "run.parquet")
    with pytest.raises(UserError, match="row 1: posterior 0.5; allowed: a list of 6 numbers from 0 to 1"):
        clean_dataset(CleaningConfig(shards.root, labels=tmp_path / "run.parquet"), tmp_path / "out", workers=1)
    assert json.loads((shards.root / "manifest.json").read_text())["multi_label"]
