"""The data contract: what lies in a shard folder, and how it is found again.

A set is a folder of plain WebDataset tars, `<split>-000000.tar`, each with DALI's `.idx` beside it. A sample is
`key.<avi|webm|mp4>` (picture only), `key.flac` (mono) and `key.json`; or, in place of the clip, `key.<stream>.npy` for
each stream of features that a frozen network gave of it. `manifest.json` describes the set, `index.parquet` says where
each member lies and which CRC-32 it has, `labels.parquet` what each sample shows, one class or several, and
`events.parquet`, where somebody watched and listened, what is heard and seen when.
Within a split, ids run from 0 to N-1 in the order of writing; every table and the memory bank is keyed by them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.files import read_table
from distav.data.integrity import CorruptFileError, verify_file
from distav.data.manifest import VIDEO_EXTENSIONS, read_manifest
from distav.data.modalities import FeatureStream
from distav.data.storage.object_store import ObjectStore, is_url

AUDIO_EXTENSION = "flac"
EVENTS = "events.parquet"
TABLES = ("index.parquet", "labels.parquet", EVENTS)


def member_extensions(codec: str, streams: Iterable[str] = ()) -> dict[str, str]:
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

    A set of features has streams, and neither codec nor rates. Of a remote set's shards only the names count.
    """

    root: str | Path
    name: str
    shards: list[Path]
    codec: str
    fps: float
    sample_rate_hz: int
    columns: dict[str, np.ndarray]
    streams: dict[str, FeatureStream] = field(default_factory=dict[str, FeatureStream])
    remote: ObjectStore | None = None

    @property
    def members(self) -> dict[str, str]:
        """The members of a sample and their extensions."""
        return member_extensions(self.codec, self.streams)

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
    def sides(self) -> tuple[int, int]:
        """Shortest and longest side of any stored frame, in pixels."""
        sides = np.concatenate([self.columns["width"], self.columns["height"]])
        return int(sides.min()), int(sides.max())

    @cached_property
    def source_codes(self) -> np.ndarray:
        """A number for the source video of each sample, [N] int64: clips cut from one video share it."""
        return np.unique(self.columns["source"], return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class ShardedDataset:
    """A folder of shards, opened; of a remote one, `root` mirrors the tables."""

    root: Path
    manifest: dict[str, Any]
    remote: ObjectStore | None = None

    @property
    def location(self) -> str:
        """The folder or URL, as users know it."""
        return self.remote.url if self.remote else str(self.root)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their numbers."""
        return self.manifest["classes"]

    @property
    def streams(self) -> dict[str, FeatureStream]:
        """Streams of features by name; empty where clips are stored."""
        return {name: FeatureStream(**each) for name, each in self.manifest.get("streams", {}).items()}

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have any number of classes, and not just one."""
        return self.manifest.get("multi_label", False)

    @classmethod
    def open(cls, root: str | Path, cache: str = "", cache_mib: int = 0) -> "ShardedDataset":
        """Open a set written by tools/make_shards.py.

        Args:
            root: its folder or URL.
            cache, cache_mib: where and how much is kept of a remote one, as in the settings; 0: tables alone.

        Raises:
            UserError: where the folder or a file that belongs to it is missing or unreadable.
        """
        if is_url(root):
            remote = ObjectStore(str(root), cache, cache_mib)
            return cls(remote.folder, read_manifest(remote.manifest, f"{remote.url}/manifest.json"), remote)
        root = Path(root).expanduser()
        path = root / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"data.root={root}: no manifest.json there. Give the folder that tools/make_shards.py wrote; "
                "if it was interrupted, run it again and it goes on."
            )
        return cls(root, read_manifest(path.read_bytes(), str(path)))

    def table(self, name: str, split: str) -> pa.Table:
        """Return the rows of a split in one of the set's own tables.

        Raises:
            UserError: where it is missing, is not what was written with the set, or cannot be read.
        """
        expected = self.manifest.get("tables", {}).get(name)
        try:
            if self.remote:
                self.remote.mirror(name, expected)
            elif expected:
                verify_file(self.root, name, expected)
        except CorruptFileError as fault:
            raise UserError(
                f"{self.location}: {fault}; copy it again. Labels of your own go into a table named by data.label_overrides."
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
                f"{key}={name} is not in {self.location}; allowed: {format_list(splits)}{none}.{did_you_mean(name, splits)}"
            )
        table, manifest = self.table("index.parquet", name), self.manifest
        codec = manifest.get("codec", "")
        for each in index_schema(member_extensions(codec, self.streams)):
            if each.name not in table.column_names or table.schema.field(each.name).type != each.type:
                raise UserError(f"{self.root / 'index.parquet'}: column '{each.name}' is missing or of another kind.")
        columns = {each: table.column(each).to_numpy(zero_copy_only=False) for each in table.column_names}
        if not np.array_equal(columns["id"], np.arange(len(table))):
            raise UserError(f"{self.root / 'index.parquet'}: the ids of split {name} do not run from 0 to N-1.")
        shards = [self.root / shard["name"] for shard in splits[name]["shards"]]
        self._check_sizes({shard["name"]: shard["bytes"] for shard in splits[name]["shards"]})
        rates = manifest.get("fps", 0.0), manifest.get("sample_rate_hz", 0)
        return Split(self.location, name, shards, codec, *rates, columns, self.streams, self.remote)

    def _check_sizes(self, expected: dict[str, int]) -> None:
        if self.remote:
            found = self.remote.sizes(expected)
        else:
            paths = {name: self.root / name for name in expected}
            found = {name: path.stat().st_size if path.is_file() else None for name, path in paths.items()}
        for name, size in found.items():
            if size != expected[name]:
                there = "no file" if size is None else f"{size} bytes"
                raise UserError(
                    f"{self.location}/{name}: {there}, expected {expected[name]} bytes; copy the shard again or make it "
                    "anew."
                )
