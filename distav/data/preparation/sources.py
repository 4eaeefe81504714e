"""Where clips come from: folders of videos, lists, digits seen and spoken, and rendered scenes."""

import csv
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, Features
from distav.data.preparation.media_decoding import decode_clips


class Source(Protocol):
    """A list of candidates and the way to make clips of each; it travels to worker processes.

    Only the builder uses what annotated sources (`distav.data.preparation.annotated_videos`) provide in addition.
    """

    def candidates(self) -> list[ClipSource]:
        """Return everything that clips may be made from, always in the same order."""
        ...

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip | Features]:
        """Make the clips of one candidate, or raise Unusable."""
        ...


@dataclass(frozen=True)
class VideoFolder:
    """`videos DIR`: one folder a class; a share of the files of each class goes to the test split."""

    folder: Path
    test_fraction: float = 0.1
    seed: int = 0

    def candidates(self) -> list[ClipSource]:
        """Return every file in every class folder.

        Raises:
            UserError: where there is no such folder, or no class folder with a file in it.
        """
        if not 0 <= self.test_fraction < 1:
            raise UserError(f"--test-fraction={self.test_fraction}: has to be from 0 up to, not including, 1.")
        if not self.folder.is_dir():
            raise UserError(f"videos {self.folder}: no such folder.")
        found = []
        for folder in sorted(each for each in self.folder.iterdir() if each.is_dir()):
            files = sorted(each for each in folder.rglob("*") if each.is_file() and not each.name.startswith("."))
            files.sort(
                key=lambda each: hashlib.sha256(f"{self.seed}/{each.relative_to(self.folder)}".encode()).digest()
            )
            num_test = round(self.test_fraction * len(files))
            found += [
                ClipSource(str(file.relative_to(self.folder)), folder.name, "test" if place < num_test else "train")
                for place, file in enumerate(files)
            ]
        if not found:
            raise UserError(
                f"videos {self.folder}: holds no class folders with files; expected {self.folder}/CLASS/FILE."
            )
        return found

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it."""
        return decode_clips(self.folder / candidate.source, candidate, encoding)


@dataclass(frozen=True)
class MediaFiles:
    """Every file in a folder, without classes, to be embedded."""

    folder: Path

    def candidates(self) -> list[ClipSource]:
        """Return every file.

        Raises:
            UserError: where there is no such folder, or none in it.
        """
        files = sorted(each for each in self.folder.rglob("*") if each.is_file() and not each.name.startswith("."))
        if not files:
            raise UserError(f"{self.folder}: holds no manifest.json of a set of shards, and no media files.")
        return [ClipSource(str(file.relative_to(self.folder)), "clip", "files") for file in files]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it."""
        return decode_clips(self.folder / candidate.source, candidate, encoding)


@dataclass(frozen=True)
class ClipList:
    """`csv FILE`: columns path, label and, if wanted, start_s, end_s, split; paths are relative to the file."""

    file: Path

    def candidates(self) -> list[ClipSource]:
        """Return every row.

        Raises:
            UserError: for a missing file or column, or a row that cannot be understood, with its line.
        """
        if not self.file.is_file():
            raise UserError(f"csv {self.file}: no such file.")
        allowed = ("path", "label", "start_s", "end_s", "split")
        found = []
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"csv {self.file}: not UTF-8 ({error}); save it as UTF-8.") from None
        with io.StringIO(text, newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = reader.fieldnames or []
            if not {"path", "label"} <= set(names) or set(names) - set(allowed):
                raise UserError(
                    f"csv {self.file}: header {format_list(names)}; needed: path, label; allowed: {format_list(allowed)}."
                )
            for row in reader:
                where = f"csv {self.file}, line {reader.line_num}"
                if not row["path"] or not row["label"]:
                    raise UserError(f"{where}: path and label may not be empty.")
                try:
                    start, end = (float(row[name]) if row.get(name) else None for name in ("start_s", "end_s"))
                except ValueError as error:
                    raise UserError(f"{where}: start_s and end_s are seconds; {error}.") from None
                times = (start or 0.0, math.inf if end is None else end)
                if not 0 <= times[0] < times[1] or (end is not None and not math.isfinite(end)):
                    raise UserError(f"{where}: start_s={start} and end_s={end}; end_s has to come after start_s >= 0.")
                found.append(ClipSource(row["path"], row["label"], row.get("split") or "train", start or 0.0, end))
        if not found:
            raise UserError(f"csv {self.file}: no rows.")
        return found

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the stretch and cut it."""
        return decode_clips(self.file.parent / candidate.source, candidate, encoding)
