"""The dataset format: the files of a dataset directory, and where each sample is stored.

A dataset is a directory of plain WebDataset tars, `<split>-000000.tar`, each with DALI's `.idx` file next to it. A
sample is `key.<avi|webm|mp4>` (video without audio), `key.flac` (mono audio) and `key.json`; a sample with one modality
lacks the file of the other one. A dataset of features has `key.<stream>.npy` for each feature stream in place of the
clip. The other files are:

- `manifest.json`: description of the dataset, see `distav.data.manifest`;
- `index.parquet`: for each sample, the shard, the byte range and CRC-32 of its members, and its source;
- `labels.parquet`: class or classes of each sample; with injected noise also `true_label` and `pair_id`;
- `events.parquet`: audible and visible events with start and end, for annotated splits.

Within a split, ids run from 0 to N-1 in the order of writing; all tables and the memory bank are indexed by id.
"""

from collections.abc import Iterable, Sequence
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
from distav.data.strings import StringColumn

AUDIO_EXTENSION = "flac"
MEMBERS = {"audio": "audio", "visual": "video"}
"""Member of a clip that holds a modality."""
EVENTS = "events.parquet"
TEXT_COLUMNS = ("key", "source")
"""Columns of strings of index.parquet, except the split."""
TABLES = ("index.parquet", "labels.parquet", EVENTS)


def member_extensions(codec: str, streams: Iterable[str] = ()) -> dict[str, str]:
    """Return the members of a sample and their file extensions: its feature streams, or else video and audio."""
    features = {name: f"{name}.npy" for name in streams}
    return features or {"video": VIDEO_EXTENSIONS[codec], "audio": AUDIO_EXTENSION}


def index_schema(members: Iterable[str]) -> pa.Schema:
    """Return the schema of index.parquet for samples with these members."""
    members = list(members)
    video_columns = (
        [("frames", pa.int32()), ("width", pa.int32()), ("height", pa.int32())] if "video" in members else []
    )
    member_columns = [("offset", pa.int64()), ("bytes", pa.int64()), ("crc32", pa.uint32())]
    return pa.schema(
        [
            ("split", pa.string()),
            ("id", pa.int64()),
            ("key", pa.string()),
            ("shard", pa.int32()),
            ("source", pa.string()),
            ("start_s", pa.float64()),
            ("duration_s", pa.float64()),
            *video_columns,
            *((f"{member}_{column}", dtype) for member in members for column, dtype in member_columns),
        ]
    )


@dataclass(frozen=True)
class Split:
    """One split of a dataset, with the storage location of each sample.

    Attributes:
        root: directory or URL of the dataset.
        name: name of the split.
        shards: paths of the tars; for a remote dataset, only their names are used.
        codec: video codec; empty in a dataset of features.
        fps: frames per second; 0 in a dataset of features.
        sample_rate_hz: audio sample rate; 0 in a dataset of features.
        columns: columns of numbers of index.parquet, [N] each.
        texts: its columns `key` and `source`, [N] each.
        streams: feature streams by name; empty in a dataset of clips.
        remote: object store of a remote dataset.
        shard_bytes: sizes of the tars of a remote dataset.
    """

    root: str | Path
    name: str
    shards: list[Path]
    codec: str
    fps: float
    sample_rate_hz: int
    columns: dict[str, np.ndarray]
    texts: dict[str, StringColumn] = field(default_factory=dict[str, StringColumn])
    streams: dict[str, FeatureStream] = field(default_factory=dict[str, FeatureStream])
    remote: ObjectStore | None = None
    shard_bytes: Sequence[int] = ()

    @property
    def members(self) -> dict[str, str]:
        """Members of a sample and their file extensions."""
        return member_extensions(self.codec, self.streams)

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def keys(self) -> StringColumn:
        """Keys by id, [N]."""
        return self.texts["key"]

    @property
    def sources(self) -> StringColumn:
        """Source videos by id, [N]."""
        return self.texts["source"]

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Number of samples in each shard; ids are consecutive within a shard and across shards."""
        return np.bincount(self.columns["shard"], minlength=len(self.shards)).tolist()

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Shortest and longest side of all stored frames, in pixels; zeros if no sample has frames."""
        has_frames = self.has_modality("visual")
        if not has_frames.any():
            return 0, 0
        sides = np.concatenate([self.columns[name][has_frames] for name in ("width", "height")])
        return int(sides.min()), int(sides.max())

    def has_modality(self, modality: str) -> np.ndarray:
        """Return whether each sample has a modality, [N] bool; a missing member has 0 bytes in the index."""
        if self.streams:
            return np.ones(len(self), dtype=bool)
        return self.columns[f"{MEMBERS[modality]}_bytes"] > 0

    @cached_property
    def source_codes(self) -> np.ndarray:
        """Index of the source video of each sample, [N] int64; clips of one video have the same index."""
        return self.sources.codes()


@dataclass(frozen=True)
class ShardedDataset:
    """An open dataset.

    Attributes:
        root: directory of the dataset; for a remote dataset, the local directory that mirrors its tables.
        manifest: content of manifest.json.
        remote: object store of a remote dataset.
    """

    root: Path
    manifest: dict[str, Any]
    remote: ObjectStore | None = None

    @property
    def location(self) -> str:
        """Directory or URL, as the user gave it."""
        return self.remote.url if self.remote else str(self.root)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their indices."""
        return self.manifest["classes"]

    @property
    def streams(self) -> dict[str, FeatureStream]:
        """Feature streams by name; empty in a dataset of clips."""
        return {name: FeatureStream(**stream) for name, stream in self.manifest.get("streams", {}).items()}

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have any number of classes instead of exactly one."""
        return self.manifest.get("multi_label", False)

    @classmethod
    def open(cls, root: str | Path, cache: str = "", cache_mib: int = 0) -> "ShardedDataset":
        """Open a dataset written by tools/make_shards.py.

        Args:
            root: directory or URL of the dataset.
            cache: local cache directory for a remote dataset, as `data.cache`.
            cache_mib: size limit of the cache in MiB, as `data.cache_mib`; 0: cache tables only.

        Raises:
            UserError: if the directory or one of its files is missing or cannot be read.
        """
        if is_url(root):
            remote = ObjectStore(str(root), cache, cache_mib)
            return cls(remote.folder, read_manifest(remote.manifest, f"{remote.url}/manifest.json"), remote)
        root = Path(root).expanduser()
        path = root / "manifest.json"
        if not root.is_dir():
            datasets = [other.parent.name for other in root.parent.glob("*/manifest.json")]
            raise UserError(
                f"data.root={root}: no such directory. Give the one that tools/make_shards.py wrote."
                + did_you_mean(root.name, datasets)
            )
        if not path.is_file():
            raise UserError(
                f"data.root={root}: no manifest.json found. Give the directory that tools/make_shards.py wrote; if it "
                "was interrupted, run it again to resume. A directory of videos is not a dataset yet: "
                "tools/make_shards.py videos makes one of it."
            )
        return cls(root, read_manifest(path.read_bytes(), str(path)))

    def table(self, name: str, split: str) -> pa.Table:
        """Return the rows of a split in one of the dataset's own tables.

        Raises:
            UserError: if the table is missing, differs from the one that was written, or cannot be read.
        """
        expected = self.manifest.get("tables", {}).get(name)
        try:
            if self.remote:
                self.remote.mirror(name, expected)
            elif expected:
                verify_file(self.root, name, expected)
        except CorruptFileError as error:
            raise UserError(
                f"{self.location}: {error}; copy the file again. To use other labels, set data.label_overrides to "
                "a table of your own."
            ) from None
        return read_table(self.root / name, filters=[("split", "=", split)])

    def split(self, name: str, key: str = "data.train_split") -> Split:
        """Return a split with the storage location of its samples.

        Args:
            name: name of the split.
            key: setting or option that names it, for error messages.

        Raises:
            UserError: for an unknown split, an invalid index, or a shard that is missing or has another size.
        """
        splits = self.manifest["splits"]
        if name not in splits:
            or_none = ", or empty for none" if key == "data.test_split" else ""
            raise UserError(
                f"{key}={name} is not a split of {self.location}; allowed: {format_list(splits)}{or_none}."
                f"{did_you_mean(name, splits)}"
            )
        columns, texts = self._index(name)
        shards = splits[name]["shards"]
        self._check_sizes({shard["name"]: shard["bytes"] for shard in shards})
        return Split(
            self.location,
            name,
            [self.root / shard["name"] for shard in shards],
            self.manifest.get("codec", ""),
            self.manifest.get("fps", 0.0),
            self.manifest.get("sample_rate_hz", 0),
            columns,
            texts,
            self.streams,
            self.remote,
            [shard["bytes"] for shard in shards],
        )

    def _index(self, split: str) -> tuple[dict[str, np.ndarray], dict[str, StringColumn]]:
        """Return the columns of numbers and of texts of index.parquet for a split."""
        table, path = self.table("index.parquet", split), self.root / "index.parquet"
        for expected in index_schema(member_extensions(self.manifest.get("codec", ""), self.streams)):
            if expected.name not in table.column_names:
                raise UserError(f"{path}: column '{expected.name}' is missing; make the dataset again.")
            dtype = table.schema.field(expected.name).type
            if dtype != expected.type:
                raise UserError(
                    f"{path}: column '{expected.name}' has type {dtype}, expected {expected.type}; make the dataset "
                    "again."
                )
        texts = {name: StringColumn(table.column(name)) for name in TEXT_COLUMNS}
        columns = {
            name: column.to_numpy(zero_copy_only=False)
            for name, column in zip(table.column_names, table.columns, strict=True)
            if not pa.types.is_string(column.type)
        }
        if not np.array_equal(columns["id"], np.arange(len(table))):
            raise UserError(f"{path}: the ids of split {split} do not run from 0 to N-1; make the dataset again.")
        return columns, texts

    def _check_sizes(self, expected: dict[str, int]) -> None:
        """Verify that every shard exists and has the size that the manifest states."""
        if self.remote:
            sizes = self.remote.sizes(expected)
        else:
            paths = {name: self.root / name for name in expected}
            sizes = {name: path.stat().st_size if path.is_file() else None for name, path in paths.items()}
        for name, size in sizes.items():
            if size != expected[name]:
                actual = "no file" if size is None else f"{size} bytes"
                raise UserError(
                    f"{self.location}/{name}: {actual}, expected {expected[name]} bytes; copy the shard again, or make "
                    "the dataset again."
                )
