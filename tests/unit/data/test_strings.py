"""Columns of strings in memory-mapped files."""

import os
import pickle
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from distav.data.strings import StringColumn

TEXTS = ["b", "a", "", "ä", "b", "a/c", "😀"]


def column_of(texts: list[str]) -> StringColumn:
    return StringColumn(pa.chunked_array([texts[:3], texts[3:]], pa.string()))


def test_strings_are_read_by_index_mask_and_slice():
    column, array = column_of(TEXTS), np.array(TEXTS, dtype=object)
    assert len(column) == 7 and column[0] == "b" and column[np.int64(3)] == "ä" and column[-1] == "😀"
    assert list(column) == column.tolist() == TEXTS
    for index in ([3, 0, 3], np.array([5]), slice(2, 5), np.arange(7) % 2 == 0, np.array([], dtype=np.int64)):
        assert column[index].tolist() == array[index].tolist()
    with pytest.raises(IndexError):
        column[7]


def test_codes_are_those_of_the_sorted_distinct_strings():
    assert np.array_equal(column_of(TEXTS).codes(), np.unique(TEXTS, return_inverse=True)[1])


def test_positions_of_unknown_texts_and_of_other_values_are_none():
    assert column_of(TEXTS).positions(["ä", "x", None, 3, "a"]) == [3, None, None, None, 1]


def test_a_table_takes_the_column_and_a_process_its_copy():
    column = column_of(TEXTS)
    assert pa.table({"key": column}).column("key").to_pylist() == TEXTS
    assert pickle.loads(pickle.dumps(column)).tolist() == TEXTS  # noqa: S301
    assert column_of([]).tolist() == [] and len(column_of([]).codes()) == 0


def test_strings_are_in_a_mapped_file_that_is_removed(tmp_path: Path):
    with mock.patch.object(tempfile, "tempdir", str(tmp_path)):
        before = pa.total_allocated_bytes()
        column = column_of([f"sample {number}" for number in range(100_000)])
        assert pa.total_allocated_bytes() - before < 100_000
        assert not os.listdir(tmp_path) and f"{tmp_path}/" in Path("/proc/self/maps").read_text()
        assert column[99_999] == "sample 99999"
    with mock.patch.object(tempfile, "tempdir", str(tmp_path / "missing")):
        assert column_of(TEXTS).tolist() == TEXTS
