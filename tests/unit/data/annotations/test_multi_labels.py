"""Label lists of a dataset, tables that replace them, and their noise."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.data.annotations.multi_labels import class_matrix, label_lists, load_multi_labels, split_label_text
from distav.data.dataset import ShardedDataset, Split
from distav.data.preparation.multi_label_noise import ClassRates
from distav.tools.inspect_shards.statistics import compute_stats, format_stats
from distav.tools.inspect_shards.verify import verify
from tests.helpers.multi_label import multi_label_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    out = tmp_path_factory.mktemp("multi") / "shards"
    multi_label_shards(out, 60, 12, ClassRates(0.1, 0.5), ClassRates(0.1, 0.1))
    return ShardedDataset.open(out)


@pytest.fixture(scope="module")
def split(shards: ShardedDataset) -> Split:
    return shards.split("train")


def test_missing_and_wrong_labels_have_the_rates_of_their_classes(shards: ShardedDataset, split: Split):
    labels = load_multi_labels(shards, split)
    assert labels.true is not None and shards.multi_label
    missing, wrong = labels.true & ~labels.given, labels.given & ~labels.true
    num_present, num_absent = labels.true.sum(0), (~labels.true).sum(0)
    assert missing.sum(0).tolist() == [
        round(rate * count) for rate, count in zip(np.linspace(0.1, 0.5, 6), num_present.tolist(), strict=True)
    ]
    assert wrong.sum(0).tolist() == [round(0.1 * count) for count in num_absent.tolist()]
    noise = shards.manifest["splits"]["train"]["noise"]
    assert noise["missing_label_rate"] == pytest.approx(missing.sum() / num_present.sum())
    assert noise["wrong_label_rate"] == pytest.approx(wrong.sum() / num_absent.sum())
    test = load_multi_labels(shards, shards.split("test"))
    assert test.true is not None and np.array_equal(test.given, test.true)
    assert list(verify(shards.root)) == []


def test_statistics_count_labels_per_clip(shards: ShardedDataset, split: Split):
    given = load_multi_labels(shards, split).given
    statistics = compute_stats(shards.root, 1, 0, 1)
    train = statistics["splits"]["train"]
    assert train["labels_per_clip"]["mean"] == pytest.approx(given.sum(1).mean())
    assert train["labels_per_clip"]["clips"] == {
        str(count): int((given.sum(1) == count).sum()) for count in set(given.sum(1).tolist())
    }
    assert {name: entry["clips"] for name, entry in train["classes"].items()} == dict(
        zip(shards.classes, given.sum(0).tolist(), strict=True)
    )
    assert f"{given.sum(1).mean():.2f} labels per clip" in format_stats(statistics, 20)


def test_tables_replace_lists(shards: ShardedDataset, split: Split, tmp_path: Path):
    given = load_multi_labels(shards, split).given
    (tmp_path / "labels.csv").write_text(f"key,label\n{split.keys[3]},dog | bell\n{split.keys[4]},\n")
    replaced = load_multi_labels(shards, split, str(tmp_path / "labels.csv")).given
    assert label_lists(replaced[3:4], shards.classes) == [["bell", "dog"]]
    assert np.array_equal(np.delete(replaced, 3, axis=0), np.delete(given, 3, axis=0))
    lists = pa.array([["rain"], []], pa.list_(pa.string()))
    pq.write_table(pa.table({"id": [0, 1], "corrected_label": lists}), tmp_path / "labels.parquet")
    replaced = load_multi_labels(shards, split, str(tmp_path / "labels.parquet")).given
    assert label_lists(replaced[:2], shards.classes) == [["rain"], []]
    assert list(verify(shards.root, str(tmp_path / "labels.parquet"))) == []
    (tmp_path / "labels.csv").write_text("id,corrected_label,knn_label\n0,dog,dog\n")
    with pytest.raises(UserError, match="labels.csv: column 'knn_label': the table is of a dataset with one label per"):
        load_multi_labels(shards, split, str(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("dog|dgo", "line 2: unknown class 'dgo'; allowed: bell, .*Did you mean 'dog'"),
        ("dog||rain", "line 2: label 'dog||rain' has an empty name; write one '|'"),
        ("dog|rain|dog", "line 2: label 'dog|rain|dog' has the class 'dog' twice; keep one"),
        ("dog;rain", "line 2: class name 'dog;rain' contains ';'; the names of a clip are separated by '|'"),
    ],
)
def test_invalid_lists_of_a_table_name_the_line(
    shards: ShardedDataset, split: Split, tmp_path: Path, label: str, message: str
):
    (tmp_path / "labels.csv").write_text(f"key,label\n{split.keys[3]},{label}\n")
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        load_multi_labels(shards, split, str(tmp_path / "labels.csv"))


def test_matrix_and_lists_are_inverse():
    lists = [["a"], [], ["a", "c"]]
    assert label_lists(class_matrix(lists, ["a", "b", "c"], "x"), ["a", "b", "c"]) == lists
    assert split_label_text(" a ; b", ";", "x") == ("a", "b")
    with pytest.raises(UserError, match="x: class 'a' occurs twice in the labels a, a; keep one"):
        class_matrix([["a", "a"]], ["a"], "x")


@pytest.mark.parametrize("text", ["1.5", "a", "0.1:0.2:0.3", "nan", "0.2:"])
def test_invalid_rates_are_rejected(text: str):
    with pytest.raises(UserError, match=f"--missing-labels={text}: allowed: RATE for all classes, or FIRST:LAST"):
        ClassRates.parse(text, "--missing-labels")


def test_rates_are_evenly_spaced():
    rates = ClassRates.parse("0.1:0.3", "--missing-labels")
    assert rates is not None
    np.testing.assert_allclose(rates.of_classes(3), [0.1, 0.2, 0.3])
    assert ClassRates.parse("", "--missing-labels") is None and ClassRates.parse("0.2", "x") == ClassRates(0.2, 0.2)


def test_recipe_names_the_noise(shards: ShardedDataset):
    config = json.loads((shards.root / "manifest.json").read_text())["recipe"]["config"]
    assert config["missing_labels"] == {"type": "ClassRates", "first": 0.1, "last": 0.5}
