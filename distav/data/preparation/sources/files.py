"""Sources of clips in media files: a directory per class, a CSV list, or files without classes."""

import argparse
import hashlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from distav.config.cli import finite_float
from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.multi_labels import LABEL_SEPARATOR
from distav.data.annotations.tables import Table, TableFormat, read_csv
from distav.data.preparation.candidates import SPLIT_NAME, SPLIT_NAME_RULE, warn_of_similar_names
from distav.data.preparation.encoding import OMIT_DEFAULT, Clip, ClipSource, Encoding
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.label_lists import join_list_labels, merge_rows
from distav.data.preparation.sources.media_tree import SkippedPaths, list_directory, printable_name, walk_files
from distav.data.preparation.sources.sample_labels import add_separator_argument

log = logging.getLogger("distav")

SPLITS = ("train", "val", "test")
"""Names of splits that are always allowed in a list."""
_LIST = TableFormat("path,label[,start_s,end_s][,split]", ("path", "label"), ("start_s", "end_s", "split"))


@dataclass(frozen=True)
class VideoFolder:
    """`videos DIR`: one subdirectory per class; a fraction of the files of each class goes to the test split."""

    description: ClassVar[str] = "Cut the videos of a directory into clips; each class has a subdirectory."
    example: ClassVar[str] = "make_shards.py videos ~/clips shards/mine --short-side 256 --clip-s 2 --workers 8"
    default_encoding: ClassVar[Encoding] = Encoding()

    folder: Path
    test_fraction: float = 0.1
    seed: int = 0

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the directory and `--test-fraction`."""
        parser.add_argument("folder", type=Path, metavar="DIR", help="directory with one subdirectory per class")
        parser.add_argument(
            "--test-fraction",
            type=finite_float,
            default=0.1,
            help="fraction of the files of each class in the test split (default: %(default)s)",
        )

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(options.folder, options.test_fraction, options.seed)

    def candidates(self) -> list[ClipSource]:
        """Return all files in all class directories.

        Raises:
            UserError: if there is no such directory, or if no class directory contains a file.
        """
        if not 0 <= self.test_fraction < 1:
            raise UserError(f"--test-fraction={self.test_fraction}: has to be at least 0 and less than 1.")
        if not self.folder.is_dir():
            raise UserError(f"videos {self.folder}: no such directory.")
        skipped = SkippedPaths(self.folder)
        candidates: list[ClipSource] = []
        class_folders, other_files = list_directory(self.folder, skipped)
        for file in other_files:
            skipped.add("file outside of the class directories", "files outside of the class directories", file)
        for class_folder in class_folders:
            files = sorted(walk_files(class_folder, skipped), key=self._shuffle_key)
            if not files:
                skipped.add("class directory without files", "class directories without files", class_folder)
            label = printable_name(Path(class_folder.name)).strip()
            num_test = round(self.test_fraction * len(files))
            for position, file in enumerate(files):
                candidates.append(_media_file(self.folder, file, label, "test" if position < num_test else "train"))
        summary = skipped.summary()
        if not candidates:
            raise UserError(
                f"videos {self.folder}: contains no class directories with files; expected {self.folder}/CLASS/FILE."
                + (f" Found: {summary}." if summary else "")
            )
        if summary:
            log.warning("videos %s: not used: %s", self.folder, summary)
        return candidates

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it into clips."""
        return decode_clips(self.folder / _file_name(candidate), candidate, encoding)

    def _shuffle_key(self, file: Path) -> bytes:
        return hashlib.sha256(os.fsencode(f"{self.seed}/{file.relative_to(self.folder)}")).digest()


@dataclass(frozen=True)
class ClipList:
    """`csv FILE`: columns path, label and optionally start_s, end_s, split; paths are relative to the file.

    Splits are named `train`, `val` or `test`, or one of `splits`. With `label_separator`, a label may contain several
    classes; with `repeated_rows`, the rows of the same clip are its classes.
    """

    description: ClassVar[str] = "Cut the videos in a CSV list into clips."
    example: ClassVar[str] = "make_shards.py csv clips.csv shards/mine --codec h264 --fps 16"
    default_encoding: ClassVar[Encoding] = Encoding()

    clip_seconds: ClassVar[float | None] = None

    file: Path
    splits: tuple[str, ...] = ()
    label_separator: str = field(default="", metadata={OMIT_DEFAULT: True})
    repeated_rows: bool = field(default=False, metadata={OMIT_DEFAULT: True})

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the list, `--splits`, `--label-separator` and `--repeated-rows`."""
        parser.add_argument("file", type=Path, metavar="FILE", help=f"csv: {_LIST.header}")
        parser.add_argument(
            "--splits",
            nargs="+",
            default=[],
            metavar="NAME",
            help=f"names that the column split may contain besides {', '.join(SPLITS)}",
        )
        add_separator_argument(parser)
        parser.add_argument(
            "--repeated-rows",
            action="store_true",
            help="rows with the same path and interval are one clip, with the label of each (default: several clips)",
        )

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(options.file, tuple(options.splits), options.label_separator, options.repeated_rows)

    @property
    def multi_label(self) -> bool:
        """Whether clips may have several classes."""
        return bool(self.label_separator) or self.repeated_rows

    def info(self) -> SourceInfo:
        """Return the classes, if clips may have several; otherwise the builder collects them."""
        if not self.multi_label:
            return SourceInfo()
        names = {name for candidate in self._read() for name in candidate.label.split(LABEL_SEPARATOR)}
        return SourceInfo(sorted(names), multi_label=True)

    def candidates(self) -> list[ClipSource]:
        """Return all rows, or with `repeated_rows` all clips.

        Raises:
            UserError: for a missing file or column, or an invalid row, with its line number.
        """
        candidates = self._read()
        warn_of_similar_names(
            {name for candidate in candidates for name in candidate.label.split(LABEL_SEPARATOR)}
            if self.multi_label
            else {candidate.label for candidate in candidates}
        )
        return candidates

    def _read(self) -> list[ClipSource]:
        for name in self.splits:
            if not SPLIT_NAME.fullmatch(name):
                raise UserError(f"--splits: '{name}'; allowed in names of splits: {SPLIT_NAME_RULE}.")
        table = read_csv(self.file, f"csv {self.file}", _LIST)
        if not len(table):
            raise UserError(f"{table.name}: has a header, but no rows.")
        rows = [_parse_row(table, row, SPLITS + self.splits) for row in range(len(table))]
        if self.multi_label:
            rows = [
                join_list_labels(candidate, self.label_separator, table.position(row))
                for row, candidate in enumerate(rows)
            ]
        return merge_rows(rows, table) if self.repeated_rows else rows

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the interval and cut it into clips."""
        return decode_clips(self.file.parent / candidate.source, candidate, encoding)


@dataclass(frozen=True)
class MediaFiles:
    """All files in a directory, without classes, to be embedded."""

    folder: Path

    def candidates(self) -> list[ClipSource]:
        """Return all files.

        Raises:
            UserError: if there is no such directory, or if it contains no file.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such directory.")
        skipped = SkippedPaths(self.folder)
        files = sorted(walk_files(self.folder, skipped))
        if not files:
            raise UserError(f"{self.folder}: contains neither the manifest.json of a dataset nor media files.")
        if summary := skipped.summary():
            log.warning("%s: not used: %s", self.folder, summary)
        return [_media_file(self.folder, file, "clip", "files") for file in files]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it into clips."""
        return decode_clips(self.folder / _file_name(candidate), candidate, encoding)


def _media_file(root: Path, file: Path, label: str, split: str) -> ClipSource:
    """Return the candidate for a file; `detail` has the name of the file if it is not UTF-8, unlike the stored one."""
    name = file.relative_to(root)
    stored_name = printable_name(name)
    return ClipSource(stored_name, label, split, detail=() if stored_name == str(name) else (str(name),))


def _file_name(candidate: ClipSource) -> str:
    return str(candidate.detail[0]) if candidate.detail else candidate.source


def _parse_row(table: Table, row: int, splits: tuple[str, ...]) -> ClipSource:
    where = table.position(row)
    cells = {column: values[row] for column, values in table.columns.items()}
    for column in ("path", "label"):
        if not cells[column]:
            raise UserError(f"{where}: {column} is empty; path and label are required in every row.")
    start, end = (_parse_seconds(cells.get(column, ""), f"{where}: {column}") for column in ("start_s", "end_s"))
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: start_s {start or 0.0:g}, end_s {end:g}; allowed: an end_s after start_s.")
    split = cells.get("split") or "train"
    if not SPLIT_NAME.fullmatch(split):
        raise UserError(f"{where}: split '{split}'; allowed in names of splits: {SPLIT_NAME_RULE}.")
    if split not in splits:
        raise UserError(
            f"{where}: split '{split}'; allowed: {format_list(splits)}.{did_you_mean(split, splits)} For a split with "
            f"another name, add the option --splits {split}."
        )
    return ClipSource(cells["path"], cells["label"], split, start or 0.0, end)


def _parse_seconds(text: str, where: str) -> float | None:
    """Return a time in seconds, or None for an empty cell."""
    if not text:
        return None
    try:
        seconds = math.nan if "_" in text else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{where} '{text}'; allowed: seconds, 0 or more, with a decimal point, or empty.")
    return seconds
