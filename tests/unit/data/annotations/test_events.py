import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distav.config.errors import UserError
from distav.config.schema import DataConfig
from distav.data.annotations.events import EVENTS_SCHEMA, events_table, load_events, read_events
from distav.data.annotations.labels import load_labels
from distav.data.annotations.llp import CLASSES
from distav.data.dataset import ShardedDataset
from distav.data.modalities import FeatureStream
from distav.data.pipeline.features import decode_features, encode_features
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import DecodeError
from distav.data.strings import StringColumn
from distav.tools.inspect_shards.verify import verify
from tests.conftest import make_shards
from tests.helpers.events import SIZES, STREAMS, llp_shards, write_llp


def column_of(texts: list[str]) -> StringColumn:
    return StringColumn(pa.chunked_array([texts], pa.string()))


@pytest.fixture(scope="module")
def llp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("llp")
    truth = write_llp(folder / "raw")
    llp_shards(folder / "raw", folder / "shards")
    return folder / "raw", folder / "shards", truth


def test_dataset_of_features_stores_features_and_annotations(llp: tuple[Path, Path, dict[str, np.ndarray]]):
    raw, root, truth = llp
    shards = ShardedDataset.open(root)
    assert shards.classes == list(CLASSES) and shards.multi_label
    assert shards.streams == {name: FeatureStream(*fields) for name, fields in STREAMS.items()}
    for name, count in SIZES.items():
        split = shards.split(name)
        labels = load_events(shards, split)
        assert len(split) == count and labels.num_segments == 10
        expected = np.stack([truth[source] for source in split.sources])
        assert np.array_equal(labels.weak, expected.any(axis=(1, 2)))
        if name == "train":
            assert labels.events is None
        else:
            assert labels.events is not None and np.array_equal(labels.events, expected)
    assert list(verify(root)) == []
    split = shards.split("train")
    loader = Loader(split, DataConfig(), None, 0, 5, torch.device("cpu"))
    batch = loader.load(np.array([7, 0, 31, -1, 12]), 0)
    loader.close()
    assert batch.valid.tolist() == [True, True, True, False, True]
    for name in STREAMS:
        stored = np.load(raw / name / f"{split.sources[31][:11]}.npy")
        assert np.array_equal(batch.media[name][2].numpy(), stored)


def test_combinations_of_classes_become_single_classes(llp: tuple[Path, Path, dict[str, np.ndarray]]):
    shards = ShardedDataset.open(llp[1])
    split = shards.split("train")
    labels, weak = load_labels(shards, split), load_events(shards, split).weak
    for sample in range(len(split)):
        for other in range(sample):
            assert (labels.given[sample] == labels.given[other]) == np.array_equal(weak[sample], weak[other])


def test_altered_features_are_quarantined_and_found_by_verify(
    llp: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path
):
    for path in llp[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    split = ShardedDataset.open(tmp_path).split("train")
    offset = int(split.columns["vggish_offset"][1])
    with open(split.shards[0], "r+b") as file:
        file.seek(offset + 200)
        file.write(b"\xff\xff\xff\xff")
    loader = Loader(split, DataConfig(), None, 0, 3, torch.device("cpu"))
    batch = loader.load(np.array([0, 1, 2]), 0)
    assert batch.valid.tolist() == [True, False, True]
    assert loader.quarantine.reasons == {1: "vggish altered in train-000000.tar: CRC-32 differs"}
    assert any("train-000000001" in error and "vggish altered" in error for error in verify(tmp_path))


def test_missing_and_invalid_features_are_rejected_with_the_reason(tmp_path: Path):
    write_llp(tmp_path)
    (tmp_path / "vggish" / "v0-00000003.npy").unlink()
    np.save(tmp_path / "vggish" / "v0-00000004.npy", np.zeros((9, 8), np.float32))
    np.save(tmp_path / "res152" / "v0-00000005.npy", np.full((80, 12), np.nan, np.float32))
    np.save(tmp_path / "res152" / "v0-00000006.npy", np.array([{}], dtype=object), allow_pickle=True)
    llp_shards(tmp_path, tmp_path / "shards", status=3)
    rows = (tmp_path / "shards" / "rejected.csv").read_text().splitlines()[1:]
    rejected = {row[:11]: row for row in rows}
    assert set(rejected) == {f"v0-0000000{number}" for number in (3, 4, 5, 6)}
    for number, reason in ((3, "missing: no file"), (4, "(9, 8)"), (5, "not finite"), (6, "|O")):
        assert reason in rejected[f"v0-0000000{number}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --videos DIR, or --features"),
        (("--features=audio:vggish={}/vggish",), "no stream of the modality 'visual'"),
        (("--features=smell:vggish={}/vggish",), "MODALITY:NAME=DIR"),
        (("--features=audio:VGG={}/vggish",), "MODALITY:NAME=DIR"),
        (("--features=audio:a={}/vggish", "--features=visual:v={}/gone"), "gone: no such directory"),
        (("--features=audio:a={}/vggish", "--features=visual:v={}"), "contains no .npy files"),
        (("--videos={}", "--label-noise=symmetric:0.5"), "need one class per sample"),
        (("--videos={}", "--clip-s=2"), "--clip-s=2: has to be 10, the duration of the annotations"),
        (("--features=audio:a={}/vggish", "--features=visual:a={}/res152"), "two streams are named 'a'"),
    ],
)
def test_invalid_arguments_are_reported(arguments: tuple[str, ...], message: str, tmp_path: Path):
    write_llp(tmp_path)
    done = make_shards(
        "llp", tmp_path, tmp_path / "out", *(argument.format(tmp_path) for argument in arguments), status=1
    )
    assert message in done.stderr and "Traceback" not in done.stderr


def test_events_are_restored_from_their_table(llp: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path):
    shards = ShardedDataset.open(llp[1])
    split = shards.split("train")
    events = np.random.default_rng(1).uniform(size=(len(split), 2, 10, 25)) < 0.3
    pq.write_table(
        events_table("train", split.keys, split.sources, shards.classes, events), tmp_path / "events.parquet"
    )
    table = tmp_path / "events.parquet"
    weak = events.any(axis=(1, 2))
    restored, annotated = read_events(table, "key", split, shards.classes, weak)
    assert np.array_equal(restored, events) and annotated.all()
    # Another dataset with a subset of the videos, in another order.
    kept = np.random.default_rng(2).permutation(len(split))[:30]
    texts = {name: column_of(column[kept].tolist()) for name, column in split.texts.items()}
    other = replace(split, columns=split.columns | {"id": np.arange(30)}, texts=texts)
    restored, annotated = read_events(table, "key", other, shards.classes, weak[kept])
    assert np.array_equal(restored, events[kept]) and annotated.all()
    unrelated = replace(split, texts=split.texts | {"source": column_of([f"{source}x" for source in split.sources])})
    with pytest.raises(UserError, match="no row has a source of"):
        read_events(table, "key", unrelated, shards.classes, weak)
    with pytest.raises(UserError, match="no rows of split test; its rows belong to train"):
        read_events(table, "key", shards.split("test"), shards.classes, weak)


def test_clip_without_a_row_is_not_annotated(llp: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path):
    shards = ShardedDataset.open(llp[1])
    split = shards.split("train")
    events = np.random.default_rng(1).uniform(size=(len(split), 2, 10, 25)) < 0.01
    events[:4] = False
    annotated = np.arange(len(split)) % 2 == 0
    events[~annotated] = False
    table = events_table("train", split.keys, split.sources, shards.classes, events, annotated)
    pq.write_table(table, tmp_path / "events.parquet")
    restored = read_events(tmp_path / "events.parquet", "key", split, shards.classes, events.any(axis=(1, 2)))
    assert np.array_equal(restored[0], events) and np.array_equal(restored[1], annotated)


def test_clips_of_one_video_are_distinguished_by_their_classes(
    llp: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path
):
    shards = ShardedDataset.open(llp[1])
    split = shards.split("train")
    sources = np.array(split.sources)
    sources[[3, 5]] = "twice"
    weak = np.zeros((len(split), 25), dtype=bool)
    weak[3, 1] = weak[5, 2] = True
    other = replace(split, texts=split.texts | {"source": column_of(sources.tolist())})
    rows = [
        {
            "split": "train",
            "id": 0,
            "source": "twice",
            "modality": "audio",
            "label": CLASSES[index],
            "start_s": index,
            "end_s": 9,
        }
        for index in (1, 2)
    ]
    schema = pa.schema([field for field in EVENTS_SCHEMA if field.name != "key"])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "events.parquet")
    events, annotated = read_events(tmp_path / "events.parquet", "key", other, shards.classes, weak)
    assert np.flatnonzero(annotated).tolist() == [3, 5]
    assert events[3, 0, 1:9, 1].all() and events[5, 0, 2:9, 2].all() and events.sum() == 15


MATCHED_BY_ID = pa.schema([field for field in EVENTS_SCHEMA if field.name not in ("key", "source")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 48}, "row 1: id 48; allowed: whole numbers from 0 to 47"),
        ({"modality": "smell"}, "modality 'smell'; allowed: audio, visual"),
        ({"end_s": 11}, "start_s 2, end_s 11; allowed: whole seconds from 0 to 10"),
        ({"start_s": None}, "start_s None, end_s 5"),
        ({"label": "Dig"}, "unknown class 'Dig'.*Did you mean 'Dog'"),
    ],
)
def test_invalid_rows_are_reported(
    change: dict[str, object], message: str, llp: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path
):
    row = {"split": "train", "id": 3, "modality": "audio", "label": "Dog", "start_s": 2, "end_s": 5}
    pq.write_table(pa.Table.from_pylist([row | change], schema=MATCHED_BY_ID), tmp_path / "events.parquet")
    shards = ShardedDataset.open(llp[1])
    with pytest.raises(UserError, match=message):
        read_events(tmp_path / "events.parquet", "key", shards.split("train"), shards.classes, np.zeros((48, 25), bool))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 2), np.float64), "dtype <f8"),
        (np.zeros((2, 3), np.float32), "expected \\(3, 2\\)"),
        (np.full((3, 2), np.inf, np.float32), "not finite"),
    ],
)
def test_invalid_features_are_rejected(values: np.ndarray, message: str):
    assert decode_features(encode_features(np.ones((3, 2), np.float16)), FeatureStream("audio", 3, 2)).sum() == 6
    with pytest.raises(DecodeError, match=message):
        decode_features(encode_features(values), FeatureStream("audio", 3, 2))
    with pytest.raises(DecodeError, match="bytes; expected"):
        decode_features(encode_features(np.ones((3, 2), np.float32))[:-1], FeatureStream("audio", 3, 2))


def test_manifest_with_an_invalid_stream_name_is_rejected(
    llp: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path
):
    manifest = json.loads((llp[1] / "manifest.json").read_text())
    manifest["streams"]["../x"] = manifest["streams"].pop("vggish")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"stream '../x' must have a plain name"):
        ShardedDataset.open(tmp_path)
