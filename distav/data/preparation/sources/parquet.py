"""Parquet tables with videos, in the layout of the Hugging Face Hub."""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import ANY_HINT, OMIT_DEFAULT, Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.media.embedded import EmbeddedFile, decode_embedded
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.parquet_rows import media_file, read_row
from distav.data.preparation.sources.sample_labels import (
    add_label_arguments,
    class_names_of,
    join_labels,
    parse_labels,
    source_info,
)
from distav.data.preparation.sources.split_patterns import SplitPattern

_HUB_NAME = re.compile(r"([A-Za-z0-9_-]+?)-\d+-of-\d+")


@dataclass(frozen=True)
class ParquetFiles:
    """`parquet FILE...`: a video, or audio alone, and a label per row.

    Attributes:
        patterns: the files; without a split it is the beginning of a name such as `test-00000-of-00002.parquet`, and
            `train` for other names.
        label: column of the labels.
        video: column of the videos, as structs with `bytes` and `path`, as contents, or as paths relative to the file.
        audio: column of the audio of videos without audio, as the videos; used if it exists.
        class_names: class names by index; empty: those of the Hugging Face metadata, or the indices.
        first_label: whether to use only the first label of a list.
        modalities: `both`: rows need a video; `any`: audio suffices, so that the column of the videos may be missing.
        label_separator: separates the classes in a text; empty: a text is one class.
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
    modalities: str = field(default="both", metadata={OMIT_DEFAULT: True})
    label_separator: str = field(default="", metadata={OMIT_DEFAULT: True})

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
            options.modalities,
            options.label_separator,
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
        """Decode the video of the row, or its audio alone, and cut it into clips."""
        location, *position = candidate.detail
        if not location:
            raise RejectedClip(str(position[0]))
        columns = (self.video, self.audio)
        row = read_row(str(location), columns, int(position[0]), int(position[1]))
        video, audio = (media_file(row.get(column), Path(str(location)).parent) for column in columns)
        if video is None and audio is None:
            raise RejectedClip(f"missing: column {self.video} is empty")
        if encoding.modalities == "any":
            return decode_embedded(video, audio, candidate, encoding)
        if video is None:
            raise RejectedClip(f"missing: column {self.video} is empty; {ANY_HINT}")
        # Audio of a video at a path, and audio at a path, are used only if clips may lack a modality.
        if isinstance(video, Path):
            return decode_clips(video, candidate, encoding)
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
        paths: path of each video, or of the audio of rows without video; empty where there is none.
        holds_paths: whether the media columns have paths instead of contents.
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
            media = _media_columns(source, path, schema)
            holds_paths = all(_is_string(schema.field(column).type) for column in media)
            values = file.read([source.label]).column(source.label).to_pylist()
            paths = [""] * len(values)
            if holds_paths:
                for column in media:
                    names = file.read([column]).column(column).to_pylist()
                    paths = [path or name or "" for path, name in zip(paths, names, strict=True)]
            group_sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"parquet {path}: cannot be read: {str(error).splitlines()[0]}") from None
    names = source.class_names or _hub_class_names(schema.metadata, source.label)
    in_lists = bool(source.label_separator) or any(isinstance(value, list) for value in values)
    labels: list[tuple[str, ...] | RejectedClip] = []
    for value in values:
        try:
            parsed = parse_labels(value, names, source.label_separator)
            labels.append(parsed[:1] if source.first_label else parsed)
        except RejectedClip as reason:
            labels.append(reason)
    return _LabeledFile(path, split, labels, paths, holds_paths, in_lists, group_sizes, names)


def _media_columns(source: ParquetFiles, path: Path, schema: pa.Schema) -> list[str]:
    """Return the columns that need media: that of the videos; if audio suffices, those that exist.

    Raises:
        UserError: for a missing column, or one with another type.
    """
    media = [source.video]
    if source.modalities == "any":
        media = [column for column in (source.video, source.audio) if column in schema.names] or media
    for column in (source.label, *media):
        if schema.names.count(column) != 1:
            hint = ""
            if column == source.video and source.audio in schema.names:
                hint = " For audio without video: --modalities any."
            raise UserError(
                f"parquet {path}: no column '{column}'; allowed: {format_list(schema.names)}. "
                f"Options: --label, --video.{hint}"
            )
    for column in media:
        column_type = schema.field(column).type
        if not _is_string(column_type) and not _has_content(column_type):
            raise UserError(
                f"parquet {path}: column '{column}' has type {column_type}; allowed: string paths, binary contents, or "
                "structs with bytes and path."
            )
    return media


def _is_string(column_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    types = pa.types
    return types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)


def _has_content(column_type: pa.DataType) -> bool:
    """Return whether the cells of a column can have the content of a file."""
    types = pa.types
    if types.is_struct(column_type):
        return bool({"bytes", "path"} & {field.name for field in column_type})
    return types.is_binary(column_type) or types.is_large_binary(column_type) or types.is_binary_view(column_type)


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
