"""What becomes of a set when a person's decisions, and a run's, are applied to it."""

import csv
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from distav.config.schema import DataConfig
from distav.data.annotations.labels import _apply, load_labels
from distav.data.dataset import ShardedDataset
from distav.data.files import read_table
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import ShardReader
from distav.data.pipeline.sampler import padded_batches
from distav.data.preparation.annotated_videos import EventSource
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.encoding import Encoding
from distav.tools.inspect_shards.verify import verify
from distav.tools.make_shards import main
from tests.helpers.events import AVE_CLASSES, write_ave
from tests.unit.data.preparation.test_builder import digests

KEYS = [f"train-{number:09d}" for number in range(96)]


def written(path: Path, **columns: list) -> Path:
    table = pa.table(columns)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def clean(root: Path, out: Path, *more: object, status: int = 3) -> ShardedDataset:
    assert main(["clean", str(root), str(out), *map(str, more)]) == status
    return ShardedDataset.open(out)


def checksums(shards: ShardedDataset, split: str) -> dict[str, tuple[int, ...]]:
    """CRC-32 of the members as they are read, by key."""
    part = shards.split(split)
    reader = ShardReader(part)
    return {
        str(key): tuple(zlib.crc32(member) for member in reader.read(sample).values())
        for sample, key in enumerate(part.keys)
    }


def labels_by_key(shards: ShardedDataset, split: str = "train") -> dict[str, str]:
    part = shards.split(split)
    labels = load_labels(shards, part)
    return {str(key): labels.classes[number] for key, number in zip(part.keys, labels.given, strict=True)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_decisions_are_applied_and_nothing_else_changes(tiny_shards: Path, tmp_path: Path, kind: str):
    old, out = ShardedDataset.open(tiny_shards), tmp_path / "out"
    before = labels_by_key(old)
    changed = {KEYS[3]: "bars+tone", KEYS[40]: "disc+sweep"}
    columns = {
        "note": ["a", "b", "c", "d"],
        "pair": ["", "mismatched", "matched", "mismatched"],
        "label": ["bars+tone", "disc+tone", "disc+sweep", ""],
        "key": [KEYS[3], KEYS[7], KEYS[40], KEYS[95]],
    }
    new = clean(tiny_shards, out, "--decisions", written(tmp_path / f"mine.{kind}", **columns), "--shard-samples=30")
    kept = [key for key in KEYS if key not in (KEYS[7], KEYS[95])]
    train = new.split("train")
    assert train.keys.tolist() == kept and train.columns["id"].tolist() == list(range(94))
    assert labels_by_key(new) == {key: changed.get(key, before[key]) for key in kept}
    assert labels_by_key(new, "test") == labels_by_key(old, "test")
    for split in ("train", "test"):
        were = checksums(old, split)
        assert checksums(new, split) == {key: were[key] for key in (kept if split == "train" else were)}
    rows = list(csv.DictReader((out / "rejected.csv").open()))
    sources = old.split("train").columns["source"]
    assert [row["path"] for row in rows] == [sources[7], sources[95]]
    assert {row["reason"] for row in rows} == {"mismatched pair"}
    assert [row["label"] for row in rows] == [before[KEYS[7]], before[KEYS[95]]]
    places = [KEYS.index(key) for key in kept]
    for column in ("source", "start_s", "frames", "width", "height", "video_crc32", "audio_bytes"):
        assert np.array_equal(train.columns[column], old.split("train").columns[column][places])
    assert list(verify(out)) == []
    assert new.manifest["num_relabeled"] == sum(before[key] != label for key, label in changed.items())


def test_truth_is_carried_along_and_pairs_while_ids_stay(tiny_shards: Path, tmp_path: Path):
    old = ShardedDataset.open(tiny_shards)
    truth = load_labels(old, old.split("train"))
    pair = written(tmp_path / "pair.csv", key=[KEYS[0]], label=["disc+tone"], pair=["mismatched"])
    fewer = clean(tiny_shards, tmp_path / "fewer", "--decisions", pair)
    found = load_labels(fewer, fewer.split("train"))
    assert np.array_equal(found.true, truth.true[1:]) and found.pair_id is None
    names = [truth.classes[number] for number in truth.true]
    right = written(tmp_path / "right.parquet", key=KEYS, label=names)
    same = clean(tiny_shards, tmp_path / "same", "--decisions", right, status=0)
    found = load_labels(same, same.split("train"))
    assert np.array_equal(found.given, truth.true) and np.array_equal(found.pair_id, truth.pair_id)
    assert same.manifest["splits"]["train"]["noise"] == {"label_rate": 0.0}
    assert old.manifest["splits"]["train"]["noise"]["label_rate"] == 0.25


def test_decisions_win_over_a_runs_table(tiny_shards: Path, tmp_path: Path):
    before = labels_by_key(ShardedDataset.open(tiny_shards))
    table = written(
        tmp_path / "labels.parquet",
        key=KEYS[:5],
        corrected=["disc+tone"] * 5,
        confidence=pa.array([0.95, 0.85, 0.99, 0.99, 0.2], pa.float32()),
        correspondence=pa.array([0.9, 0.9, 0.1, 0.1, 0.3], pa.float32()),
    )
    options = ["--labels", table, "--min-correspondence=0.25"]
    new = labels_by_key(clean(tiny_shards, tmp_path / "run", *options))
    assert sorted(set(KEYS) - set(new)) == [KEYS[2], KEYS[3]]
    assert [new[KEYS[row]] for row in (0, 1, 4)] == ["disc+tone", before[KEYS[1]], before[KEYS[4]]]
    mine = written(tmp_path / "m.csv", key=[KEYS[0], KEYS[2]], label=["cross+pulse", ""], pair=["", "matched"])
    new = labels_by_key(clean(tiny_shards, tmp_path / "both", *options, "--decisions", mine))
    assert sorted(set(KEYS) - set(new)) == [KEYS[3]]
    assert (new[KEYS[0]], new[KEYS[2]]) == ("cross+pulse", "disc+tone")
    new = labels_by_key(clean(tiny_shards, tmp_path / "bold", "--labels", table, "--min-confidence=0.8", status=0))
    assert [new[KEYS[row]] for row in range(5)] == ["disc+tone"] * 4 + [before[KEYS[4]]]


def test_the_same_command_goes_on_and_other_decisions_are_refused(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine, out = written(tmp_path / "mine.csv", key=KEYS[:1], label=["disc+tone"]), tmp_path / "out"
    clean(tiny_shards, out, "--decisions", mine, "--shard-samples=20", "--workers=3", status=0)
    whole = digests(out)
    (out / ".work").mkdir()
    recipe = json.loads((out / "manifest.json").read_text())["recipe"]
    (out / ".work" / "recipe.json").write_text(json.dumps(recipe, indent=1, sort_keys=True))
    for name in ("manifest.json", "index.parquet", "train-000001.tar", "train-000003.idx"):
        (out / name).unlink()
    clean(tiny_shards, out, "--decisions", mine, "--shard-samples=20", "--workers=1", status=0)
    assert digests(out) == whole
    written(mine, key=KEYS[:1], label=["disc+sweep"])
    clean(tiny_shards, out, "--decisions", mine, "--shard-samples=20", status=1)
    assert "other arguments" in capsys.readouterr().err


def test_training_reads_a_cleaned_set(tiny_shards: Path, tmp_path: Path):
    mine = written(tmp_path / "mine.csv", key=KEYS[:2], label=["", ""], pair=["mismatched", "mismatched"])
    split = clean(tiny_shards, tmp_path / "out", "--decisions", mine).split("train")
    data = DataConfig(num_frames=4, frame_stride=1, frame_size=24, audio_s=0.5)
    loader = Loader(split, data, None, 0, 8, torch.device("cpu"))
    batches = list(loader.batches((some, 0) for some in padded_batches(np.arange(94), 8, 12)))
    loader.close()
    assert sum(int(batch.valid.sum()) for batch in batches) == 94


def test_sets_of_features_with_events_are_cleaned(tmp_path: Path):
    write_ave(tmp_path / "ave")
    rng = np.random.default_rng(0)
    for name, dim in (("heard", 4), ("seen", 6)):
        (tmp_path / name).mkdir()
        for video in (tmp_path / "ave" / "videos").glob("*.mp4"):
            np.save(tmp_path / name / f"{video.stem}.npy", rng.standard_normal((10, dim)).astype(np.float32))
    streams = (("audio", "heard", tmp_path / "heard"), ("visual", "seen", tmp_path / "seen"))
    build_dataset(
        EventSource("ave", tmp_path / "ave", None, streams), tmp_path / "set", BuildConfig(Encoding(clip_s=10)), 1
    )
    old = ShardedDataset.open(tmp_path / "set")
    keys = old.split("train").keys.tolist()
    mine = written(tmp_path / "m.csv", key=[keys[2], keys[0]], label=["", AVE_CLASSES[2]], pair=["mismatched", ""])
    new = clean(tmp_path / "set", tmp_path / "out", "--decisions", mine)
    assert list(verify(tmp_path / "out")) == []
    were = checksums(old, "train")
    assert checksums(new, "train") == {key: were[key] for key in keys if key != keys[2]}
    assert labels_by_key(new)[keys[0]] == AVE_CLASSES[2]
    ids = {key: number for number, key in enumerate(new.split("train").keys.tolist())}
    before, after = (read_table(tmp_path / each / "events.parquet").to_pylist() for each in ("set", "out"))
    told = [row | {"id": ids[row["key"]] if row["split"] == "train" else row["id"]} for row in before
            if row["key"] != keys[2]]  # fmt: skip
    assert after == told and len(told) < len(before)


COLUMNS = {"key": [KEYS[0]], "label": ["disc+tone"], "pair": [""]}
RUN = {"key": [KEYS[0]], "corrected_label": ["disc+tone"], "confidence": [0.95], "correspondence": [0.1]}


@pytest.mark.parametrize(
    ("option", "columns", "expected"),
    [
        ("--decisions", COLUMNS | {"key": ["train-99"]}, "1 keys are not in split train"),
        (
            "--decisions",
            COLUMNS | {"label": ["disc+tune"]},
            f"key '{KEYS[0]}': unknown class 'disc+tune'; allowed: bars",
        ),
        ("--decisions", COLUMNS | {"label": ["disc+tune"]}, "Did you mean 'disc+tone'"),
        ("--decisions", COLUMNS | {"pair": ["wong"]}, "pair 'wong'; allowed: mismatched, matched, or nothing"),
        ("--decisions", {"key": [KEYS[0]]}, "column 'label' is missing; needed: key, label; found: key"),
        ("--decisions", {name: each * 2 for name, each in COLUMNS.items()}, f"key '{KEYS[0]}' is there more than once"),
        ("--labels", COLUMNS, "column 'corrected_label' is missing"),
        ("--labels", RUN | {"confidence": ["high"]}, "confidence 'high'; allowed: numbers"),
        ("--labels", RUN | {"corrected_label": ["dog"]}, "unknown class 'dog'"),
        ("--labels", {**RUN, "key": ["test-000000000"]}, "1 keys are not in split train"),
    ],
)
def test_wrong_tables_are_named(
    option: str, columns: dict, expected: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = written(tmp_path / "table.csv", **columns)
    assert main(["clean", str(tiny_shards), str(tmp_path / "out"), option, str(table)]) == 1
    said = capsys.readouterr().err
    assert expected in said and f"{option}={table}" in said
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_named(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def told(*arguments: object) -> str:
        assert main(["clean", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    mine = written(tmp_path / "mine.csv", key=KEYS, label=[""] * 96, pair=["mismatched"] * 96)
    assert "give --decisions FILE, --labels TABLE" in told(tiny_shards, tmp_path / "out")
    assert "gone.csv: No such file" in told(tiny_shards, tmp_path / "out", f"--decisions={tmp_path / 'gone.csv'}")
    assert "every clip of train would be left out" in told(tiny_shards, tmp_path / "out", f"--decisions={mine}")
    assert "--min-confidence=2.0" in told(tiny_shards, tmp_path / "out", f"--labels={mine}", "--min-confidence=2")
    assert "holds a set made with other arguments" in told(tiny_shards, tiny_shards, f"--decisions={mine}")


def test_damaged_members_are_not_copied(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    with open(root / "test-000000.tar", "r+b") as file:
        file.seek(int(ShardedDataset.open(root).split("test").columns["audio_offset"][4]) + 50)
        file.write(b"\x00\xff\x5a")
    mine = written(tmp_path / "mine.csv", key=KEYS[:1], label=["disc+tone"])
    assert main(["clean", str(root), str(tmp_path / "out"), f"--decisions={mine}"]) == 1
    assert "test-000000.tar: audio of 'test-scene-" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_table_of_labels_names_classes_as_text_and_may_leave_some_out(tiny_shards: Path, tmp_path: Path):
    split = ShardedDataset.open(tiny_shards).split("train")
    given = np.zeros(len(split), np.int64)
    table = tmp_path / "own.csv"
    table.write_text(f"key,label\n{KEYS[1]},2\n{KEYS[2]},\n{KEYS[3]},null\n")
    found = _apply(table, split, ["1", "2", "null"], given)
    assert found.nonzero()[0].tolist() == [1, 3] and found[[1, 3]].tolist() == [1, 2]
    table.write_text("id,label\n5,2\n")
    assert _apply(table, split, ["1", "2", "null"], given).nonzero()[0].tolist() == [5]
