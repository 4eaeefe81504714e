"""The data contract: what lies in a shard folder, and how it is found again.

A set is a folder of plain WebDataset tars, `<split>-000000.tar`, each with DALI's `.idx` beside it. A sample is
`key.<avi|webm|mp4>` (picture only), `key.flac` (mono) and `key.json`; or, in place of the clip, `key.<stream>.npy` for
each stream of features that a frozen network gave of it. `manifest.json` describes the set, `index.parquet` says where
each member lies and which CRC-32 it has, `labels.parquet` what each sample shows, one class or several, and
`events.parquet`, where somebody watched and listened, what is heard and seen when.
Within a split, ids run from 0 to N-1 in the order of writing; every table and the memory bank is keyed by them.
"""

import json
import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distav.errors import UserError, listed, nearest
from distav.sealing import Damaged, check

VIDEO_EXTENSIONS = {"mjpeg": "avi", "vp9": "webm", "h264": "mp4"}
AUDIO_EXTENSION = "flac"
EVENTS = "events.parquet"
TABLES = ("index.parquet", "labels.parquet", EVENTS)
STREAM_NAME = re.compile(r"[a-z][a-z0-9_]*")
SENSES = ("audio", "visual")
"""What is heard and what is seen, in the order of every axis of both."""


@dataclass(frozen=True)
class Stream:
    """Features that a frozen network gave of one sense of a sample: [steps, dim] float16 or float32."""

    sense: str
    steps: int
    dim: int


def members_of(codec: str, streams: Iterable[str] = ()) -> dict[str, str]:
    """Return the members of a sample and their extensions: picture and sound, or streams of features where given."""
    features = {name: f"{name}.npy" for name in streams}
    return features or {"video": VIDEO_EXTENSIONS[codec], "audio": AUDIO_EXTENSION}


def index_schema(members: Iterable[str]) -> pa.Schema:
    """Return the columns of index.parquet for samples of these members."""
    members = list(members)
    picture = [("frames", pa.int32()), ("width", pa.int32()), ("height", pa.int32())] if "video" in members else []
    places = [("offset", pa.int64()), ("bytes", pa.int64()), ("crc32", pa.uint32())]
    return pa.schema(
        [
            ("split", pa.string()),
            ("id", pa.int64()),
            ("key", pa.string()),
            ("shard", pa.int32()),
            ("source", pa.string()),
            ("start_s", pa.float64()),
            ("duration_s", pa.float64()),
            *picture,
            *((f"{member}_{column}", kind) for member in members for column, kind in places),
        ]
    )


@dataclass(frozen=True)
class Split:
    """One split of a set: where each of its samples lies.

    A set of features has streams, and neither codec nor rates.
    """

    root: Path
    name: str
    shards: list[Path]
    codec: str
    fps: float
    sample_rate_hz: int
    columns: dict[str, np.ndarray]
    streams: dict[str, Stream] = field(default_factory=dict[str, Stream])

    @property
    def members(self) -> dict[str, str]:
        """The members of a sample and their extensions."""
        return members_of(self.codec, self.streams)

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def keys(self) -> np.ndarray:
        """Keys by id: [N] str."""
        return self.columns["key"]

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard; ids are consecutive inside a shard and from shard to shard."""
        return np.bincount(self.columns["shard"], minlength=len(self.shards)).tolist()

    @cached_property
    def shortest_side(self) -> int:
        """Shortest side of any stored frame, in pixels."""
        return int(min(self.columns["width"].min(), self.columns["height"].min()))

    @cached_property
    def source_codes(self) -> np.ndarray:
        """A number for the source video of each sample, [N] int64: clips cut from one video share it."""
        return np.unique(self.columns["source"], return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards, opened."""

    root: Path
    manifest: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their numbers."""
        return self.manifest["classes"]

    @property
    def streams(self) -> dict[str, Stream]:
        """Streams of features by name; empty where clips are stored."""
        return {name: Stream(**each) for name, each in self.manifest.get("streams", {}).items()}

    @property
    def several_labels(self) -> bool:
        """Whether a sample may have any number of classes, and not just one."""
        return self.manifest.get("several_labels", False)

    @classmethod
    def open(cls, root: str | Path) -> "ShardSet":
        """Open a set written by tools/make_shards.py.

        Raises:
            UserError: where the folder or a file that belongs to it is missing or unreadable.
        """
        root = Path(root).expanduser()
        path = root / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"data.root={root}: no manifest.json there. Give the folder that tools/make_shards.py wrote; "
                "if it was interrupted, run it again and it goes on."
            )
        try:
            manifest = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); make the shards again.") from None
        if fault := _manifest_fault(manifest):
            raise UserError(f"{path} is damaged ({fault}); make the shards again.")
        return cls(root, manifest)

    def table(self, name: str, split: str) -> pa.Table:
        """Return the rows of a split in one of the set's own tables.

        Raises:
            UserError: where it is missing, is not what was written with the set, or cannot be read.
        """
        expected = self.manifest.get("tables", {}).get(name)
        try:
            if expected:
                check(self.root, name, expected)
        except Damaged as fault:
            raise UserError(
                f"{self.root}: {fault}; copy it again. Labels of your own go into a table named by data.labels."
            ) from None
        return read_table(self.root / name, filters=[("split", "=", split)])

    def split(self, name: str, key: str = "data.train_split") -> Split:
        """Return where the samples of a split lie.

        Raises:
            UserError: for an unknown split, an unreadable index, or a shard that is missing or has another size.
        """
        splits = self.manifest["splits"]
        if name not in splits:
            none = ", or empty for none" if key == "data.test_split" else ""
            raise UserError(
                f"{key}={name} is not in {self.root}; allowed: {listed(splits)}{none}.{nearest(name, splits)}"
            )
        table, manifest = self.table("index.parquet", name), self.manifest
        codec = manifest.get("codec", "")
        for each in index_schema(members_of(codec, self.streams)):
            if each.name not in table.column_names or table.schema.field(each.name).type != each.type:
                raise UserError(f"{self.root / 'index.parquet'}: column '{each.name}' is missing or of another kind.")
        columns = {each: table.column(each).to_numpy(zero_copy_only=False) for each in table.column_names}
        if not np.array_equal(columns["id"], np.arange(len(table))):
            raise UserError(f"{self.root / 'index.parquet'}: the ids of split {name} do not run from 0 to N-1.")
        shards = []
        for shard in splits[name]["shards"]:
            path = self.root / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
                raise UserError(
                    f"{path}: {found}, expected {shard['bytes']} bytes; copy the shard again or make it anew."
                )
            shards.append(path)
        rates = manifest.get("fps", 0.0), manifest.get("sample_rate_hz", 0)
        return Split(self.root, name, shards, codec, *rates, columns, self.streams)


def _manifest_fault(manifest: Any) -> str:
    """Return what is wrong with a manifest; nothing of it is used before."""
    if not isinstance(manifest, dict):
        return "no JSON object"
    kinds: dict[str, Any] = {"splits": dict, "classes": list}
    clips = {"codec": str, "fps": int | float, "sample_rate_hz": int}
    for key, kind in (kinds | ({"streams": dict} if "streams" in manifest else clips)).items():
        if not isinstance(manifest.get(key), kind):
            return f"'{key}' is missing or of another kind"
    classes = manifest["classes"]
    if not classes or not all(isinstance(each, str) for each in classes) or len(set(classes)) < len(classes):
        return "'classes' is no list of different names"
    if not isinstance(manifest.get("several_labels", False), bool):
        return "'several_labels' is neither true nor false"
    if fault := _streams_fault(manifest["streams"]) if "streams" in manifest else _clips_fault(manifest):
        return fault
    tables = manifest.get("tables", {})
    if not isinstance(tables, dict) or not all(isinstance(each, dict) for each in tables.values()):
        return "'tables' is of another kind"
    for name, split in manifest["splits"].items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list) or not all(map(_is_shard, shards)):
            return f"split '{name}' has no list of shards with plain names and sizes"
    return ""


def _clips_fault(manifest: dict[str, Any]) -> str:
    if manifest["codec"] not in VIDEO_EXTENSIONS:
        return f"codec '{manifest['codec']}'; allowed: {listed(VIDEO_EXTENSIONS)}"
    if not 0 < manifest["fps"] < 1e4 or not 0 < manifest["sample_rate_hz"] < 1e6:
        return "a rate that no clip has"
    return ""


def _streams_fault(streams: dict[str, Any]) -> str:
    for name, each in streams.items():
        sizes = [each.get("steps"), each.get("dim")] if isinstance(each, dict) else []
        if not STREAM_NAME.fullmatch(name) or not all(isinstance(size, int) and size > 0 for size in sizes):
            return f"stream '{name}' has no plain name, or no steps and dim"
        if set(each) != {"sense", "steps", "dim"} or each["sense"] not in SENSES:
            return f"stream '{name}' is of no sense; allowed: {listed(SENSES)}"
    return "" if {each["sense"] for each in streams.values()} == set(SENSES) else "no streams of both senses"


def _is_shard(each: Any) -> bool:
    name, size = (each.get("name"), each.get("bytes")) if isinstance(each, dict) else (None, None)
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-]+\.tar", name)) and isinstance(size, int)


def read_table(path: Path, **options: Any) -> pa.Table:
    """Read a Parquet file, or raise a UserError that names it."""
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the whole folder, or make it anew.")
    try:
        return columns_once(pq.read_table(path, **options))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def columns_once(table: pa.Table) -> pa.Table:
    """Return the table, or raise ArrowInvalid where two columns have one name."""
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise pa.ArrowInvalid(f"column '{twice[0]}' is there more than once")
    return table


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a file so that it is either whole or not there, whoever else writes it at the same time.

    Args:
        path: the file.
        content: of it.
        scratch: folder of the same file system in which it lies until it is whole; the file's own where None.
    """
    part = unfinished(path, scratch)
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def unfinished(path: Path, scratch: Path | None = None) -> Path:
    """Return a name for a file until it is whole, which no other process on any machine takes."""
    return (scratch or path.parent) / f"{path.name}.{uuid.uuid4().hex[:12]}.part"


def write_table(path: Path, table: pa.Table, scratch: Path | None = None) -> None:
    """Write a Parquet file as `write_atomically` does."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes(), scratch)
