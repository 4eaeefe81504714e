"""Fuzzing targets: the parsers of files that others wrote; each accepts any bytes or raises an expected error."""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distav.config.errors import UserError
from distav.data import integrity
from distav.data.annotations.events import EVENTS_SCHEMA, load_events, read_events
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset, index_schema
from distav.data.manifest import FORMAT
from distav.data.modalities import FeatureStream
from distav.data.pipeline.avi import jpeg_frames
from distav.data.pipeline.features import decode_features, encode_features
from distav.data.pipeline.reader import DecodeError
from distav.data.preparation.encoding import Encoding, encode_video
from distav.data.storage.tar import members_by_key
from distav.tools.inspect_shards.verify import sample_json

EXPECTED_ERRORS = (UserError, DecodeError, integrity.CorruptFileError)
CLASSES = ["cat", "dog"]


def _manifest() -> bytes:
    shard = {"name": "train-000000.tar", "bytes": 4, "clips": 3}
    content = {"format": FORMAT, "classes": CLASSES, "codec": "mjpeg", "fps": 8.0, "sample_rate_hz": 8000,
               "splits": {"train": {"shards": [shard]}}}  # fmt: skip
    return json.dumps(content).encode()


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _index() -> bytes:
    schema = index_schema(["video", "audio"])
    rows = {
        field.name: np.zeros(3).astype(field.type.to_pandas_dtype())
        for field in schema
        if not pa.types.is_string(field.type)
    }
    rows["id"] = np.arange(3)
    text = {"split": ["train"] * 3, "key": ["a", "b", "c"], "source": ["x", "x", "y"]}
    return _parquet(pa.table({**rows, **text}).select(schema.names).cast(schema))


def _labels() -> bytes:
    return _parquet(pa.table({"split": ["train"] * 3, "id": [0, 1, 2], "label": ["cat", "dog", "cat"]}))


def _events() -> bytes:
    row = {
        "split": "train",
        "id": 1,
        "key": "b",
        "source": "x",
        "modality": "visual",
        "label": "dog",
        "start_s": 0,
        "end_s": 1,
    }
    return _parquet(pa.Table.from_pylist([row], schema=EVENTS_SCHEMA))


def _multi_labels() -> bytes:
    return _parquet(pa.table({"split": ["train"] * 3, "id": [0, 1, 2], "label": [["cat"], ["dog", "cat"], []]}))


STREAM = FeatureStream("audio", 3, 2)


def _features() -> bytes:
    return encode_features(np.arange(6, dtype=np.float32).reshape(3, 2))


def _tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.avi", "a.flac", "a.json", "b.avi", "b.clip_l14.npy"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    return sink.getvalue()


def _dataset(folder: Path, **files: bytes) -> Path:
    content = {"manifest.json": _manifest(), "index.parquet": _index(), "labels.parquet": _labels(),
               "train-000000.tar": b"1234"}  # fmt: skip
    content |= {name.replace("_", "."): file for name, file in files.items()}
    for name, file in content.items():
        (folder / name).write_bytes(file)
    return folder


def tar(content: bytes, folder: Path) -> None:
    (folder / "any.tar").write_bytes(content)
    members_by_key(folder / "any.tar")


def manifest(content: bytes, folder: Path) -> None:
    shards = ShardedDataset.open(_dataset(folder, manifest_json=content))
    for name in shards.manifest["splits"]:
        shards.split(name)


def index(content: bytes, folder: Path) -> None:
    split = ShardedDataset.open(_dataset(folder, index_parquet=content)).split("train")
    assert len(split) == len(split.keys) and len(split.source_codes) == len(split)


def labels(content: bytes, folder: Path) -> None:
    shards = ShardedDataset.open(_dataset(folder, labels_parquet=content))
    load_labels(shards, shards.split("train"))


def _table(content: bytes, folder: Path, name: str) -> None:
    shards = ShardedDataset.open(_dataset(folder))
    (folder / name).write_bytes(content)
    load_labels(shards, shards.split("train"), str(folder / name))


def label_csv(content: bytes, folder: Path) -> None:
    _table(content, folder, "mine.csv")


def label_parquet(content: bytes, folder: Path) -> None:
    _table(content, folder, "mine.parquet")


def events(content: bytes, folder: Path) -> None:
    shards = ShardedDataset.open(_dataset(folder))
    (folder / "events.parquet").write_bytes(content)
    read_events(folder / "events.parquet", "key", shards.split("train"), CLASSES, np.ones((3, 2), bool))


def weak_labels(content: bytes, folder: Path) -> None:
    multi_label = json.dumps(json.loads(_manifest()) | {"multi_label": True}).encode()
    shards = ShardedDataset.open(_dataset(folder, labels_parquet=content, manifest_json=multi_label))
    load_events(shards, shards.split("train"))


def features(content: bytes, folder: Path) -> None:
    assert decode_features(content, STREAM).shape == (3, 2)


def avi(content: bytes, folder: Path) -> None:
    assert len(jpeg_frames(content, [0, 2, 9])) == 3


def _avi() -> bytes:
    frames = np.arange(3 * 16 * 16 * 3).reshape(3, 16, 16, 3).astype(np.uint8)
    return encode_video(frames, Encoding("mjpeg", fps=3, short_side=16, clip_s=1))


def sample(content: bytes, folder: Path) -> None:
    sample_json(content)


def checkpoint_manifest(content: bytes, folder: Path) -> None:
    integrity.parse_manifest(content)


def _checkpoint_manifest() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "state.json").write_bytes(b"{}")
        integrity.write_manifest(Path(name), {"state.json": integrity.file_entry(Path(name) / "state.json")})
        return (Path(name) / integrity.MANIFEST).read_bytes()


TARGETS: dict[str, tuple[Callable[[bytes, Path], None], bytes]] = {
    "tar": (tar, _tar()),
    "manifest": (manifest, _manifest()),
    "index": (index, _index()),
    "labels": (labels, _labels()),
    "label_csv": (label_csv, b"id,label\n0,cat\n1,dog\n"),
    "label_parquet": (label_parquet, _labels()),
    "events": (events, _events()),
    "weak_labels": (weak_labels, _multi_labels()),
    "avi": (avi, _avi()),
    "features": (features, _features()),
    "sample": (sample, b'{"id": 3, "source": "x"}'),
    "checkpoint_manifest": (checkpoint_manifest, _checkpoint_manifest()),
}
"""Targets by name, each with a valid input."""


def run_target(name: str, content: bytes) -> None:
    """Run a target on any bytes; passes on unexpected errors."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            TARGETS[name][0](content, Path(folder))
        except EXPECTED_ERRORS:
            return
