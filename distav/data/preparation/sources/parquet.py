"""Parquet tables with videos, in the layout of the Hugging Face Hub."""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.media.embedded import EmbeddedFile, decode_embedded
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.sample_labels import (
    add_label_arguments,
    class_names_of,
    join_labels,
    parse_labels,
    source_info,
)
from distav.data.preparation.sources.split_patterns import SplitPattern

_HUB_NAME = re.compile(r"([A-Za-z0-9_-]+?)-\d+-of-\d+")
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetFiles:
    """`parquet FILE...`: a video and a label per row.

    Attributes:
        patterns: the files; without a split it is the beginning of a name such as `test-00000-of-00002.parquet`, and
            `train` for other names.
        label: column of the labels.
        video: column of the videos, as structs with `bytes` and `path`, or paths relative to the file.
        audio: column of the audio of videos without audio, as the videos; used if it exists.
        class_names: class names by index; empty: those of the Hugging Face metadata, or the indices.
        first_label: whether to use only the first label of a list.
    """

    description: ClassVar[str] = "Cut the videos in Parquet tables (Hugging Face layout) into clips."
    example: ClassVar[str] = "make_shards.py parquet 'data/*.parquet' shards/mine --video video --label label"
    default_encoding: ClassVar[Encoding] = Encoding()
    clip_seconds: ClassVar[float | None] = None

    patterns: tuple[SplitPattern, ...]
    label: str = "label"
    video: str = "video"
    audio: str = "audio"
    class_names: tuple[str, ...] = ()
    first_label: bool = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the files and the names of the columns."""
        add = parser.add_argument
        add(
            "patterns",
            nargs="+",
            metavar="FILE",
            help="[SPLIT=]FILE with * or {000..999} (default split: from its name)",
        )
        for column in ("label", "video", "audio"):
            add(f"--{column}", default=column, metavar="COLUMN", help=f"column of the {column} (default: %(default)s)")
        add_label_arguments(parser)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(
            tuple(SplitPattern.parse(text) for text in options.patterns),
            options.label,
            options.video,
            options.audio,
            class_names_of(options),
            options.first_label,
        )

    def candidates(self) -> list[ClipSource]:
        """Return all rows.

        Raises:
            UserError: for a file that cannot be read, or a missing column.
        """
        candidates = []
        for file in _read_labels(self):
            for row, (label, path) in enumerate(zip(file.labels, file.paths, strict=True)):
                name = path if file.holds_paths and path else f"{file.path}/{row}"
                if isinstance(label, RejectedClip):
                    candidates.append(ClipSource(name, "", file.split, detail=("", str(label))))
                    continue
                joined = join_labels(label, f"{file.path}, row {row}")
                detail = (str(file.path), *file.row_group(row))
                candidates.append(ClipSource(name, joined, file.split, detail=detail))
        if not candidates:
            raise UserError(f"parquet {format_list(pattern.pattern for pattern in self.patterns)}: no rows.")
        return candidates

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the video of the row and cut it into clips."""
        location, *position = candidate.detail
        if not location:
            raise RejectedClip(str(position[0]))
        columns = (self.video, self.audio)
        row = _read_row(str(location), columns, int(position[0]), int(position[1]))
        video = _media_file(row.get(self.video), Path(str(location)).parent)
        if isinstance(video, Path):
            return decode_clips(video, candidate, encoding)
        if video is None:
            raise RejectedClip(f"missing: column {self.video} is empty")
        audio = _media_file(row.get(self.audio), Path(str(location)).parent)
        return decode_embedded(video, audio if isinstance(audio, EmbeddedFile) else None, candidate, encoding)

    def info(self) -> SourceInfo:
        """Return the classes, and whether labels are lists."""
        files = _read_labels(self)
        labels = [label for file in files for label in file.labels if not isinstance(label, RejectedClip)]
        multi_label = not self.first_label and any(file.in_lists for file in files)
        return source_info(labels, files[0].class_names if files else (), multi_label)


@dataclass(frozen=True)
class _LabeledFile:
    """The labels of a Parquet file.

    Attributes:
        path, split: the file and its split.
        labels: classes of each row, or why it cannot be used.
        paths: path of each video; empty where there is none.
        holds_paths: whether the column of the videos has paths instead of contents.
        in_lists: whether the labels are lists.
        group_sizes: rows of each row group.
        class_names: class names by index; empty if there are none.
    """

    path: Path
    split: str
    labels: list[tuple[str, ...] | RejectedClip]
    paths: list[str]
    holds_paths: bool
    in_lists: bool
    group_sizes: list[int]
    class_names: tuple[str, ...]

    def row_group(self, row: int) -> tuple[int, int]:
        """Return the row group of a row, and its position in it."""
        group = int(np.searchsorted(np.cumsum(self.group_sizes), row, side="right"))
        return group, row - sum(self.group_sizes[:group])


@lru_cache(maxsize=1)
def _read_labels(source: ParquetFiles) -> list[_LabeledFile]:
    """Read the labels of all files.

    Raises:
        UserError: for a file that cannot be read, a missing column, or files with different class names.
    """
    files = []
    for pattern in source.patterns:
        for location in pattern.files():
            path = Path(location)
            match = _HUB_NAME.fullmatch(path.stem)
            files.append(_read_file(source, path, pattern.split or (match[1] if match else "train")))
            if files[-1].class_names != files[0].class_names:
                raise UserError(
                    f"parquet {path}: the class names of column {source.label} differ from those of {files[0].path}; "
                    "use --class-names."
                )
    return files


def _read_file(source: ParquetFiles, path: Path, split: str) -> _LabeledFile:
    if not path.is_file():
        raise UserError(f"parquet {path}: no such file.")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for column in (source.label, source.video):
                if schema.names.count(column) != 1:
                    raise UserError(
                        f"parquet {path}: no column '{column}'; allowed: {format_list(schema.names)}. "
                        "Options: --label, --video."
                    )
            holds_paths = _is_string(schema.field(source.video).type)
            if not holds_paths and not pa.types.is_struct(schema.field(source.video).type):
                raise UserError(
                    f"parquet {path}: column '{source.video}' has type {schema.field(source.video).type}; allowed: "
                    "string paths, or structs with bytes and path."
                )
            values = file.read([source.label]).column(source.label).to_pylist()
            paths = [""] * len(values)
            if holds_paths:
                paths = [value or "" for value in file.read([source.video]).column(source.video).to_pylist()]
            group_sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"parquet {path}: cannot be read: {str(error).splitlines()[0]}") from None
    names = source.class_names or _hub_class_names(schema.metadata, source.label)
    in_lists = any(isinstance(value, list) for value in values)
    labels: list[tuple[str, ...] | RejectedClip] = []
    for value in values:
        try:
            parsed = parse_labels(value, names)
            labels.append(parsed[:1] if source.first_label else parsed)
        except RejectedClip as reason:
            labels.append(reason)
    return _LabeledFile(path, split, labels, paths, holds_paths, in_lists, group_sizes, names)


def _is_string(column_type: pa.DataType) -> bool:
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def _hub_class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Return the class names of a column in the Hugging Face metadata of a schema; empty if there are none."""
    try:
        feature = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][column]
    except (ValueError, KeyError, TypeError):
        return ()
    while not (isinstance(feature, dict) and feature.get("_type") == "ClassLabel"):
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        elif isinstance(feature, dict) and "feature" in feature:
            feature = feature["feature"]
        else:
            return ()
    return tuple(str(name) for name in feature.get("names") or ())


class _RowReader:
    """Reads rows of a row group in order, one at a time; memory holds a data page, at most the row group."""

    def __init__(self, path: str, columns: tuple[str, ...], group: int):
        self.file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        present = [column for column in columns if column in self.file.schema_arrow.names]
        self.batches = self.file.iter_batches(1, row_groups=[group], columns=present)
        self.position = 0

    def read(self, row: int) -> dict[str, Any]:
        """Return the values of a row, which is not before the last one that was read."""
        batch = None
        while self.position <= row:
            batch = next(self.batches)
            self.position += 1
        assert batch is not None
        return batch.to_pylist()[0]


_reader: tuple[tuple[str, tuple[str, ...], int], _RowReader] | None = None
"""The row group that this process reads."""


def _read_row(path: str, columns: tuple[str, ...], group: int, row: int) -> dict[str, Any]:
    """Return the values of a row by column.

    Raises:
        RejectedClip: if it cannot be read.
    """
    global _reader
    key = (path, columns, group)
    try:
        if _reader is None or _reader[0] != key or _reader[1].position > row:
            _reader = key, _RowReader(path, columns, group)
        return _reader[1].read(row)
    except (pa.ArrowException, OSError, StopIteration) as error:
        _reader = None
        raise RejectedClip(f"not readable: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def _media_file(value: object, folder: Path) -> EmbeddedFile | Path | None:
    """Return the media of a cell: a file inside the table, a file in the folder of the table, or None."""
    path, content = value, None
    if isinstance(value, dict):
        path, content = value.get("path"), value.get("bytes")
    if isinstance(content, bytes):
        extension = Path(str(path or "")).suffix.lstrip(".")
        return EmbeddedFile(extension if extension.isalnum() else "bin", _writer(content))
    return folder / str(path) if path else None


def _writer(content: bytes) -> Any:
    def copy_to(file: BinaryIO) -> None:
        file.write(content)

    return copy_to
