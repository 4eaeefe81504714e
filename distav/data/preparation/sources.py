"""Sources of clips in media files: a directory per class, a CSV list, or files without classes."""

import argparse
import csv
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import Clip, ClipSource, Encoding
from distav.data.preparation.media_decoding import decode_clips

_CSV_COLUMNS = ("path", "label", "start_s", "end_s", "split")


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
            type=float,
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
        candidates = []
        for class_folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            files = sorted(_files_in(class_folder), key=self._shuffle_key)
            num_test = round(self.test_fraction * len(files))
            for position, file in enumerate(files):
                split = "test" if position < num_test else "train"
                candidates.append(ClipSource(str(file.relative_to(self.folder)), class_folder.name, split))
        if not candidates:
            raise UserError(
                f"videos {self.folder}: contains no class directories with files; expected {self.folder}/CLASS/FILE."
            )
        return candidates

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it into clips."""
        return decode_clips(self.folder / candidate.source, candidate, encoding)

    def _shuffle_key(self, file: Path) -> bytes:
        return hashlib.sha256(f"{self.seed}/{file.relative_to(self.folder)}".encode()).digest()


@dataclass(frozen=True)
class ClipList:
    """`csv FILE`: columns path, label and optionally start_s, end_s, split; paths are relative to the file."""

    description: ClassVar[str] = "Cut the videos in a CSV list into clips."
    example: ClassVar[str] = "make_shards.py csv clips.csv shards/mine --codec h264 --fps 16"
    default_encoding: ClassVar[Encoding] = Encoding()

    file: Path

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the list."""
        parser.add_argument("file", type=Path, metavar="FILE", help="csv: path,label[,start_s,end_s][,split]")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(options.file)

    def candidates(self) -> list[ClipSource]:
        """Return all rows.

        Raises:
            UserError: for a missing file or column, or an invalid row, with its line number.
        """
        if not self.file.is_file():
            raise UserError(f"csv {self.file}: no such file.")
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"csv {self.file}: not UTF-8 ({error}); save it as UTF-8.") from None
        with io.StringIO(text, newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = reader.fieldnames or []
            if not {"path", "label"} <= set(names) or set(names) - set(_CSV_COLUMNS):
                raise UserError(
                    f"csv {self.file}: header {format_list(names)}; needed: path, label; "
                    f"allowed: {format_list(_CSV_COLUMNS)}."
                )
            candidates = [_parse_row(row, f"csv {self.file}, line {reader.line_num}") for row in reader]
        if not candidates:
            raise UserError(f"csv {self.file}: no rows.")
        return candidates

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
        files = sorted(_files_in(self.folder))
        if not files:
            raise UserError(f"{self.folder}: contains neither the manifest.json of a dataset nor media files.")
        return [ClipSource(str(file.relative_to(self.folder)), "clip", "files") for file in files]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it into clips."""
        return decode_clips(self.folder / candidate.source, candidate, encoding)


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _parse_row(row: dict[str, str], where: str) -> ClipSource:
    if not row["path"] or not row["label"]:
        raise UserError(f"{where}: path and label may not be empty.")
    try:
        start = float(row["start_s"]) if row.get("start_s") else None
        end = float(row["end_s"]) if row.get("end_s") else None
    except ValueError as error:
        raise UserError(f"{where}: start_s and end_s have to be seconds; {error}.") from None
    if not 0 <= (start or 0.0) < (math.inf if end is None else end) or (end is not None and not math.isfinite(end)):
        raise UserError(f"{where}: start_s={start} and end_s={end}; allowed: start_s >= 0 and a larger end_s.")
    return ClipSource(row["path"], row["label"], row.get("split") or "train", start or 0.0, end)
