from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.data.annotations.labels import _replace_labels, load_labels
from distav.data.annotations.multi_labels import _replace_lists
from distav.data.dataset import ShardedDataset, Split

KEYS = ["train-000000003", "train-000000004"]


@pytest.fixture(scope="module")
def shards(tiny_shards: Path) -> ShardedDataset:
    return ShardedDataset.open(tiny_shards)


@pytest.fixture(scope="module")
def split(shards: ShardedDataset) -> Split:
    return shards.split("train")


def test_override_replaces_given_labels_of_its_rows(shards: ShardedDataset, split: Split, tmp_path: Path):
    given = load_labels(shards, split).given
    (tmp_path / "labels.csv").write_text(f'key, label\n{KEYS[0]} ,"disc+tone "\n{KEYS[1]},\n', "utf-8-sig")
    replaced = load_labels(shards, split, str(tmp_path / "labels.csv")).given
    assert shards.classes[replaced[3]] == "disc+tone"
    assert np.array_equal(np.delete(replaced, 3), np.delete(given, 3))


@pytest.mark.parametrize("reads_lists", [False, True])
def test_removals_that_are_ignored_are_counted_in_a_warning(
    reads_lists: bool, shards: ShardedDataset, split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table, given = tmp_path / "d.csv", np.zeros((len(split), len(shards.classes)), bool)
    replace = _replace_lists if reads_lists else _replace_labels
    table.write_text(f"key,label,pair,action\n{KEYS[0]},,mismatched,\n{KEYS[1]},disc+tone,matched,keep\n")
    replace(table, split, shards.classes, given if reads_lists else given[:, 0].astype(int))
    assert f"data.label_overrides={table}: 1 of 2 rows remove their clip" in caplog.text
    assert f"make_shards.py clean SHARDS OUT --decisions {table}" in caplog.text
    caplog.clear()
    table.write_text(f"key,label,action\n{KEYS[0]},disc+tone,keep\n")
    load_labels(shards, split, str(table))
    assert not caplog.records


def test_corrected_labels_take_precedence_over_labels(shards: ShardedDataset, split: Split, tmp_path: Path):
    columns = {"id": [3], "label": [shards.classes[0]], "corrected_label": [shards.classes[1]]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    assert load_labels(shards, split, str(tmp_path / "labels.parquet")).given[3] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"key,label\n{KEYS[0]},disk+tone\n", r"line 2: unknown class 'disk\+tone'.*'disc\+tone'"),
        ("id,label\n999,disc+tone\n", r"does not have the samples of 1 of 1 rows: 999 \(line 2\); its ids are 0 to 95"),
        ("id,label\n3,\n-1,\n1.0,\nx,\n", r"3 of 4 rows: -1 \(line 3\), 1.0 \(line 4\), x \(line 5\); its ids"),
        ("key,label\nclip,disc+tone\n", r"rows: clip \(line 2\); its keys are train-000000000, train-000000001, "),
        ("name,label\nx,y\n", "needs `id` or `key`"),
        ("id,label,label\n3,a,b\n", "line 1: more than one column is named 'label'"),
        ("id,labels\n3,a\n", "line 1: unknown column 'labels'; allowed: .*Did you mean 'label'"),
        ("key,label,corected_label\nx,y,z\n", "Did you mean 'corrected_label'"),
        (f"key,label\n{KEYS[0]},disc,tone\n", "line 2: 3 cells, the header has 2"),
        (f'key,label\n{KEYS[0]},"disc+tone\n{KEYS[1]},disc+tone\n', "line 2: the quotes .* are not balanced"),
        (
            f"key,label\n{KEYS[0]},disc+tone\n{KEYS[1]},disc+tone\n{KEYS[0]},bars+tone\n{KEYS[0]},disc+tone\n",
            f"key '{KEYS[0]}' occurs in 3 rows: lines 2, 4, 5; keep one",
        ),
        ("id,label\n7,disc+tone\n7,disc+tone\n", "id '7' occurs in 2 rows: lines 2, 3; keep one"),
    ],
)
def test_invalid_override_is_reported(shards: ShardedDataset, split: Split, tmp_path: Path, content: str, message: str):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_labels(shards, split, str(tmp_path / "labels.csv"))
    assert "labels.csv" in str(error.value)


@pytest.mark.parametrize(("column", "values"), [("label", [["disc+tone"]]), ("key", [[KEYS[0]]])])
def test_override_with_lists_is_reported(
    shards: ShardedDataset, split: Split, tmp_path: Path, column: str, values: list
):
    columns = {"key": [KEYS[0]], "label": ["disc+tone"]} | {column: values}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    with pytest.raises(UserError, match="the table is of a multi-label dataset, and .* have one label|does not have"):
        load_labels(shards, split, str(tmp_path / "labels.parquet"))
