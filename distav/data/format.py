"""The data contract: what lies in a shard folder, and how it is found again.

A set is a folder of plain WebDataset tars, `<split>-000000.tar`, each with DALI's `.idx` beside it. A sample is
`key.<avi|webm|mp4>` (picture only), `key.flac` (mono) and `key.json`. `manifest.json` describes the set,
`index.parquet` says where each member lies and which CRC-32 it has, `labels.parquet` what each sample shows.
Within a split, ids run from 0 to N-1 in the order of writing; every table and the memory bank is keyed by them.
"""

import json
import os
import re
from dataclasses import dataclass
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
TABLES = ("index.parquet", "labels.parquet")

INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("source", pa.string()),
        ("start_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("video_offset", pa.int64()),
        ("video_bytes", pa.int64()),
        ("video_crc32", pa.uint32()),
        ("audio_offset", pa.int64()),
        ("audio_bytes", pa.int64()),
        ("audio_crc32", pa.uint32()),
    ]
)


@dataclass(frozen=True)
class Split:
    """One split of a set: where each of its samples lies."""

    root: Path
    name: str
    shards: list[Path]
    codec: str
    fps: float
    sample_rate_hz: int
    columns: dict[str, np.ndarray]

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
        table = self.table("index.parquet", name)
        for field in INDEX_SCHEMA:
            if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
                raise UserError(f"{self.root / 'index.parquet'}: column '{field.name}' is missing or of another kind.")
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
        manifest = self.manifest
        return Split(self.root, name, shards, manifest["codec"], manifest["fps"], manifest["sample_rate_hz"], columns)


def _manifest_fault(manifest: Any) -> str:
    """Return what is wrong with a manifest; nothing of it is used before."""
    kinds = {"splits": dict, "classes": list, "codec": str, "fps": int | float, "sample_rate_hz": int}
    if not isinstance(manifest, dict):
        return "no JSON object"
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            return f"'{key}' is missing or of another kind"
    classes, codec = manifest["classes"], manifest["codec"]
    if not classes or not all(isinstance(each, str) for each in classes) or len(set(classes)) < len(classes):
        return "'classes' is no list of different names"
    if codec not in VIDEO_EXTENSIONS:
        return f"codec '{codec}'; allowed: {listed(VIDEO_EXTENSIONS)}"
    if not 0 < manifest["fps"] < 1e4 or not 0 < manifest["sample_rate_hz"] < 1e6:
        return "a rate that no clip has"
    tables = manifest.get("tables", {})
    if not isinstance(tables, dict) or not all(isinstance(each, dict) for each in tables.values()):
        return "'tables' is of another kind"
    for name, split in manifest["splits"].items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list) or not all(map(_is_shard, shards)):
            return f"split '{name}' has no list of shards with plain names and sizes"
    return ""


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


def write_dali_index(tar: Path, members: dict[str, list[tuple[str, int, int]]]) -> None:
    """Write the `.idx` beside a shard, in the v1.2 format of DALI's wds2idx."""
    write_atomically(tar.with_suffix(".idx"), dali_index(members))


def dali_index(members: dict[str, list[tuple[str, int, int]]]) -> bytes:
    """Return the content of a shard's `.idx`."""
    lines = [f"v1.2 {len(members)}"]
    for key, parts in members.items():
        lines.append(" ".join(f"{extension} {offset} {size} {key}.{extension}" for extension, offset, size in parts))
    return ("\n".join(lines) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file so that it is either whole or not there."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())
