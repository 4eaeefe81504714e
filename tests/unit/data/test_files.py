import multiprocessing
from pathlib import Path

import pyarrow as pa
import pytest

from distav.config.errors import UserError
from distav.data.files import check_column_names, claim_dir, read_table, write_atomically, write_if_absent, write_table

FACTS = {"batch": 8, "input": {"weights": "abc", "frames": [16, 2]}}


def claim(path: Path, facts: dict) -> None:
    claim_dir(path, facts, f"{path.parent}: holds embeddings made with other options", "choose another --out")


def test_directory_is_claimed_by_the_first_configuration(tmp_path: Path):
    path = tmp_path / "out" / "facts.json"
    claim(path, FACTS)
    content = path.read_bytes()
    claim(path, FACTS)
    assert path.read_bytes() == content and [file.name for file in path.parent.iterdir()] == ["facts.json"]


@pytest.mark.parametrize(
    ("facts", "difference"),
    [
        (FACTS | {"batch": 4}, r"\(batch: 8 recorded, 4 requested\); choose another --out\."),
        (
            FACTS | {"input": {"weights": "abc", "frames": [16, 4]}},
            r"\(input.frames: \[16, 2\] recorded, \[16, 4\] req",
        ),
        ({"batch": 8}, r'input: \{"frames": .* recorded, nothing requested'),
        (FACTS | {"extra": "x" * 100}, r"extra: nothing recorded, x{60}\.\.\. requested"),
    ],
)
def test_directory_of_another_configuration_is_rejected_with_the_difference(
    tmp_path: Path, facts: dict, difference: str
):
    path = tmp_path / "facts.json"
    claim(path, FACTS)
    content = path.read_bytes()
    with pytest.raises(UserError, match=difference):
        claim(path, facts)
    assert path.read_bytes() == content


def test_corrupt_claim_is_rejected(tmp_path: Path):
    (tmp_path / "facts.json").write_text('{"batch": 8')
    with pytest.raises(UserError, match="facts.json is not valid JSON"):
        claim(tmp_path / "facts.json", FACTS)


def test_claim_that_cannot_be_written_is_reported(tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"facts.json cannot be written: .*; choose another --out\."):
        claim(tmp_path / "out" / "facts.json", FACTS)


def _claim_as(path: Path, name: str, results) -> None:
    try:
        claim(path, {"owner": name})
        results.put(name)
    except UserError:
        results.put("")


def test_of_concurrent_processes_exactly_one_configuration_wins(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_claim_as, args=(tmp_path / "facts.json", name, results)) for name in "ababab"]
    for process in processes:
        process.start()
    winners = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert winners in ({"a", ""}, {"b", ""})


def test_write_if_absent_keeps_an_existing_file(tmp_path: Path):
    write_if_absent(tmp_path / "file", b"first")
    write_if_absent(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_the_previous_file(tmp_path: Path):
    write_atomically(tmp_path / "file", b"first")
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "file", b"second", scratch=tmp_path / "missing")
    assert (tmp_path / "file").read_bytes() == b"first"


def test_tables_with_duplicate_columns_are_rejected(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["id", "id"])
    write_table(tmp_path / "a.parquet", table)
    with pytest.raises(UserError, match="a.parquet cannot be read as Parquet: more than one column is named 'id'"):
        read_table(tmp_path / "a.parquet")
    with pytest.raises(pa.ArrowInvalid, match="more than one column is named 'id'"):
        check_column_names(table.schema)


def test_missing_table_is_reported(tmp_path: Path):
    with pytest.raises(UserError, match="b.parquet: no such file"):
        read_table(tmp_path / "b.parquet")
