"""make_shards.py clean: decisions of a person and labels of a run, applied to a dataset."""

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
from distav.data.annotations.labels import _replace_labels, load_labels
from distav.data.dataset import ShardedDataset
from distav.data.files import read_table
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import ShardReader
from distav.data.pipeline.sampler import padded_batches
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.annotated_videos import FeatureFolder
from distav.data.preparation.sources.ave import AVESource
from distav.tools.inspect_shards.verify import verify
from distav.tools.make_shards import main
from tests.helpers.events import AVE_CLASSES, write_ave
from tests.unit.data.preparation.test_builder import digests

KEYS = [f"train-{number:09d}" for number in range(96)]


def write_review(path: Path, **columns: list) -> Path:
    table = pa.table(columns)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def clean(root: Path, out: Path, *options: object, status: int = 3) -> ShardedDataset:
    assert main(["clean", str(root), str(out), *map(str, options)]) == status
    return ShardedDataset.open(out)


def checksums(shards: ShardedDataset, split_name: str) -> dict[str, tuple[int, ...]]:
    """CRC-32 of the members that the reader returns, by key."""
    split = shards.split(split_name)
    reader = ShardReader(split)
    return {
        str(key): tuple(zlib.crc32(member) for member in reader.read(sample).values())
        for sample, key in enumerate(split.keys)
    }


def labels_by_key(shards: ShardedDataset, split_name: str = "train") -> dict[str, str]:
    split = shards.split(split_name)
    labels = load_labels(shards, split)
    return {str(key): labels.classes[label] for key, label in zip(split.keys, labels.given, strict=True)}


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_decisions_change_labels_and_remove_clips(tiny_shards: Path, tmp_path: Path, extension: str):
    old, out = ShardedDataset.open(tiny_shards), tmp_path / "out"
    old_labels = labels_by_key(old)
    relabeled = {KEYS[3]: "bars+tone", KEYS[40]: "disc+sweep"}
    columns = {
        "note": ["a", "b", "c", "d"],
        "pair": ["", "mismatched", "matched", "mismatched"],
        "label": ["bars+tone", "disc+tone", "disc+sweep", ""],
        "key": [KEYS[3], KEYS[7], KEYS[40], KEYS[95]],
    }
    decisions = write_review(tmp_path / f"decisions.{extension}", **columns)
    new = clean(tiny_shards, out, "--decisions", decisions, "--shard-samples=30")
    kept = [key for key in KEYS if key not in (KEYS[7], KEYS[95])]
    train = new.split("train")
    assert train.keys.tolist() == kept and train.columns["id"].tolist() == list(range(94))
    assert labels_by_key(new) == {key: relabeled.get(key, old_labels[key]) for key in kept}
    assert labels_by_key(new, "test") == labels_by_key(old, "test")
    for split in ("train", "test"):
        expected = checksums(old, split)
        assert checksums(new, split) == {key: expected[key] for key in (kept if split == "train" else expected)}
    rejected = list(csv.DictReader((out / "rejected.csv").open()))
    sources = old.split("train").sources
    assert [row["path"] for row in rejected] == [sources[7], sources[95]]
    assert {row["reason"] for row in rejected} == {"mismatched pair"}
    assert [row["label"] for row in rejected] == [old_labels[KEYS[7]], old_labels[KEYS[95]]]
    listed = list(csv.DictReader((out / "clips.csv").open()))
    assert [row["label"] for row in listed if row["split"] == "train"] == list(labels_by_key(new).values())
    assert [row["path"] for row in listed if row["split"] == "train"] == train.sources.tolist()
    assert [row["label"] for row in listed if row["split"] == "test"] == list(labels_by_key(old, "test").values())
    assert all(float(row["end_s"]) > float(row["start_s"]) for row in listed)
    old_ids = [KEYS.index(key) for key in kept]
    assert train.sources.tolist() == sources[old_ids].tolist()
    for column in ("start_s", "frames", "width", "height", "video_crc32", "audio_bytes"):
        assert np.array_equal(train.columns[column], old.split("train").columns[column][old_ids])
    assert list(verify(out)) == []
    assert new.manifest["num_relabeled"] == sum(old_labels[key] != label for key, label in relabeled.items())


def test_true_labels_are_kept_and_pair_ids_only_if_ids_do_not_change(tiny_shards: Path, tmp_path: Path):
    old = ShardedDataset.open(tiny_shards)
    old_labels = load_labels(old, old.split("train"))
    decisions = write_review(tmp_path / "pair.csv", key=[KEYS[0]], label=["disc+tone"], pair=["mismatched"])
    smaller = clean(tiny_shards, tmp_path / "smaller", "--decisions", decisions)
    labels = load_labels(smaller, smaller.split("train"))
    assert np.array_equal(labels.true, old_labels.true[1:]) and labels.pair_id is None
    true_names = [old_labels.classes[label] for label in old_labels.true]
    decisions = write_review(tmp_path / "true.parquet", key=KEYS, label=true_names)
    corrected = clean(tiny_shards, tmp_path / "corrected", "--decisions", decisions, status=0)
    labels = load_labels(corrected, corrected.split("train"))
    assert np.array_equal(labels.given, old_labels.true) and np.array_equal(labels.pair_id, old_labels.pair_id)
    assert corrected.manifest["splits"]["train"]["noise"] == {"label_rate": 0.0}
    assert old.manifest["splits"]["train"]["noise"]["label_rate"] == 0.25


def test_decisions_take_precedence_over_labels_of_a_run(tiny_shards: Path, tmp_path: Path):
    old_labels = labels_by_key(ShardedDataset.open(tiny_shards))
    table = write_review(
        tmp_path / "labels.parquet",
        key=KEYS[:5],
        corrected_label=["disc+tone"] * 5,
        confidence=pa.array([0.95, 0.85, 0.99, 0.99, 0.2], pa.float32()),
        correspondence=pa.array([0.9, 0.9, 0.1, 0.1, 0.3], pa.float32()),
    )
    options = ["--labels", table, "--min-correspondence=0.25"]
    new = labels_by_key(clean(tiny_shards, tmp_path / "run", *options))
    assert sorted(set(KEYS) - set(new)) == [KEYS[2], KEYS[3]]
    assert [new[KEYS[row]] for row in (0, 1, 4)] == ["disc+tone", old_labels[KEYS[1]], old_labels[KEYS[4]]]
    decisions = write_review(
        tmp_path / "decisions.csv", key=[KEYS[0], KEYS[2]], label=["cross+pulse", ""], pair=["", "matched"]
    )
    new = labels_by_key(clean(tiny_shards, tmp_path / "both", *options, "--decisions", decisions))
    assert sorted(set(KEYS) - set(new)) == [KEYS[3]]
    assert (new[KEYS[0]], new[KEYS[2]]) == ("cross+pulse", "disc+tone")
    options = ["--labels", table, "--min-confidence=0.8"]
    new = labels_by_key(clean(tiny_shards, tmp_path / "confident", *options, status=0))
    assert [new[KEYS[row]] for row in range(5)] == ["disc+tone"] * 4 + [old_labels[KEYS[4]]]


def test_the_same_command_resumes_and_other_decisions_are_rejected(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    decisions, out = write_review(tmp_path / "decisions.csv", key=KEYS[:1], label=["disc+tone"]), tmp_path / "out"
    clean(tiny_shards, out, "--decisions", decisions, "--shard-samples=20", "--workers=3", status=0)
    complete = digests(out)
    (out / ".work").mkdir()
    recipe = json.loads((out / "manifest.json").read_text())["recipe"]
    (out / ".work" / "recipe.json").write_text(json.dumps(recipe, indent=1, sort_keys=True))
    for name in ("manifest.json", "index.parquet", "train-000001.tar", "train-000003.idx"):
        (out / name).unlink()
    clean(tiny_shards, out, "--decisions", decisions, "--shard-samples=20", "--workers=1", status=0)
    assert digests(out) == complete
    write_review(decisions, key=KEYS[:1], label=["disc+sweep"])
    clean(tiny_shards, out, "--decisions", decisions, "--shard-samples=20", status=1)
    assert "(content of --decisions: " in capsys.readouterr().err
    write_review(decisions, key=KEYS[:1], label=["disc+tune"])
    clean(tiny_shards, out, "--decisions", decisions, "--shard-samples=20", status=1)
    assert "unknown class 'disc+tune'" in capsys.readouterr().err


def test_the_loader_reads_a_cleaned_dataset(tiny_shards: Path, tmp_path: Path):
    decisions = write_review(
        tmp_path / "decisions.csv", key=KEYS[:2], label=["", ""], pair=["mismatched", "mismatched"]
    )
    split = clean(tiny_shards, tmp_path / "out", "--decisions", decisions).split("train")
    data = DataConfig(num_frames=4, frame_stride=1, frame_size=24, audio_s=0.5)
    loader = Loader(split, data, None, 0, 8, torch.device("cpu"))
    batches = list(loader.batches((ids, 0) for ids in padded_batches(np.arange(94), 8, 12)))
    loader.close()
    assert sum(int(batch.valid.sum()) for batch in batches) == 94


def test_a_dataset_of_features_with_events_is_cleaned(tmp_path: Path):
    write_ave(tmp_path / "ave")
    rng = np.random.default_rng(0)
    streams = []
    for modality, name, dim in (("audio", "vggish", 4), ("visual", "res152", 6)):
        streams.append(FeatureFolder(modality, name, tmp_path / name))
        (tmp_path / name).mkdir()
        for video in (tmp_path / "ave" / "videos").glob("*.mp4"):
            np.save(tmp_path / name / f"{video.stem}.npy", rng.standard_normal((10, dim)).astype(np.float32))
    source = AVESource(tmp_path / "ave", features=tuple(streams))
    build_dataset(source, tmp_path / "set", BuildConfig(Encoding(clip_s=10)), 1)
    old = ShardedDataset.open(tmp_path / "set")
    keys = old.split("train").keys.tolist()
    decisions = write_review(
        tmp_path / "decisions.csv", key=[keys[2], keys[0]], label=["", AVE_CLASSES[2]], pair=["mismatched", ""]
    )
    new = clean(tmp_path / "set", tmp_path / "out", "--decisions", decisions)
    assert list(verify(tmp_path / "out")) == []
    old_checksums = checksums(old, "train")
    assert checksums(new, "train") == {key: old_checksums[key] for key in keys if key != keys[2]}
    assert labels_by_key(new)[keys[0]] == AVE_CLASSES[2]
    new_ids = {key: sample for sample, key in enumerate(new.split("train").keys.tolist())}
    old_events = read_table(tmp_path / "set" / "events.parquet").to_pylist()
    new_events = read_table(tmp_path / "out" / "events.parquet").to_pylist()
    expected = [
        row | {"id": new_ids[row["key"]] if row["split"] == "train" else row["id"]}
        for row in old_events
        if row["key"] != keys[2]
    ]
    assert new_events == expected and len(expected) < len(old_events)


DECISIONS = {"key": [KEYS[0]], "label": ["disc+tone"], "pair": [""]}
RUN = {"key": [KEYS[0]], "corrected_label": ["disc+tone"], "confidence": [0.95], "correspondence": [0.1]}


@pytest.mark.parametrize(
    ("option", "columns", "message"),
    [
        ("--decisions", DECISIONS | {"key": ["train-99"]}, "rows: train-99 (line 2); its keys are train-000000000, "),
        (
            "--decisions",
            DECISIONS | {"label": ["disc+tune"]},
            "line 2: unknown class 'disc+tune'; allowed: bars",
        ),
        ("--decisions", DECISIONS | {"label": ["disc+tune"]}, "Did you mean 'disc+tone'"),
        ("--decisions", DECISIONS | {"pair": ["wong"]}, "pair 'wong'; allowed: mismatched, matched, or empty"),
        ("--decisions", {"key": [KEYS[0]]}, "column 'label' is missing; the first line has to be the header key,label"),
        (
            "--decisions",
            {name: values * 2 for name, values in DECISIONS.items()},
            f"key '{KEYS[0]}' occurs in 2 rows: lines 2, 3; keep one",
        ),
        ("--decisions", {"key": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "but no rows"),
        ("--decisions", {"key": KEYS[:1], "class": ["dog"], "decision": ["add"]}, "table is of a multi-label dataset"),
        (
            "--labels",
            {"key": KEYS[:1], "corrected_label": ["dog"], "posterior": [1.0]},
            "of a multi-label dataset, and",
        ),
        ("--labels", DECISIONS, "column 'corrected_label' is missing"),
        ("--labels", RUN | {"confidence": ["high"]}, "confidence 'high'; allowed: numbers"),
        ("--labels", RUN | {"corrected_label": ["dog"]}, "unknown class 'dog'"),
        ("--labels", RUN | {"confidence": ["nan"]}, "line 2: confidence 'nan'; allowed: numbers from 0 to 1, or empty"),
        ("--labels", {**RUN, "key": ["test-000000000"]}, "does not have the samples of 1 of 1 rows: test-000000000"),
        (
            "--decisions",
            {"key": [KEYS[0]], "label": [""], "pairs": [""]},
            "unknown column 'pairs'; allowed: key, label",
        ),
    ],
)
def test_invalid_tables_are_reported(
    option: str, columns: dict, message: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = write_review(tmp_path / "table.csv", **columns)
    assert main(["clean", str(tiny_shards), str(tmp_path / "out"), option, str(table)]) == 1
    error = capsys.readouterr().err
    assert message in error and f"{option}={table}" in error
    assert not (tmp_path / "out").exists()


def test_invalid_arguments_are_reported(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def error_of(*arguments: object) -> str:
        assert main(["clean", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    out = tmp_path / "out"
    decisions = write_review(tmp_path / "decisions.csv", key=KEYS, label=[""] * 96, pair=["mismatched"] * 96)
    assert "give --decisions FILE, --labels TABLE" in error_of(tiny_shards, out)
    assert "gone.csv: No such file" in error_of(tiny_shards, out, f"--decisions={tmp_path / 'gone.csv'}")
    assert "all clips of train would be removed" in error_of(tiny_shards, out, f"--decisions={decisions}")
    assert "--min-confidence=2.0" in error_of(tiny_shards, out, f"--labels={decisions}", "--min-confidence=2")
    for directory, relation in (
        (tiny_shards, "OUT is SHARDS"),
        (tiny_shards / "clean", "OUT is inside SHARDS"),
        (tiny_shards.parent, "OUT is a directory that contains SHARDS"),
    ):
        error = error_of(tiny_shards, directory, f"--decisions={decisions}")
        assert f"OUT={directory}: {relation}" in error and "give another directory for OUT." in error


def test_corrupt_members_are_not_copied(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    with open(root / "test-000000.tar", "r+b") as file:
        file.seek(int(ShardedDataset.open(root).split("test").columns["audio_offset"][4]) + 50)
        file.write(b"\x00\xff\x5a")
    decisions = write_review(tmp_path / "decisions.csv", key=KEYS[:1], label=["disc+tone"])
    assert main(["clean", str(root), str(tmp_path / "out"), f"--decisions={decisions}"]) == 1
    assert "test-000000.tar: audio of 'test-scene-" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_label_tables_read_classes_as_text_and_keep_given_labels_for_empty_cells(tiny_shards: Path, tmp_path: Path):
    split = ShardedDataset.open(tiny_shards).split("train")
    given = np.zeros(len(split), np.int64)
    table = tmp_path / "labels.csv"
    table.write_text(f"key,label\n{KEYS[1]},2\n{KEYS[2]},\n{KEYS[3]},null\n")
    labels = _replace_labels(table, split, ["1", "2", "null"], given)
    assert labels.nonzero()[0].tolist() == [1, 3] and labels[[1, 3]].tolist() == [1, 2]
    table.write_text("id,label\n5,2\n")
    assert _replace_labels(table, split, ["1", "2", "null"], given).nonzero()[0].tolist() == [5]
