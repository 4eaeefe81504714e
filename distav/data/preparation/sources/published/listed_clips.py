"""Clips of a published list and the files that contain them."""

import argparse
import csv
import io
import os
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.annotations.tables import read_utf8
from distav.data.files import write_atomically
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.annotated_videos import VIDEO_SUFFIXES
from distav.data.preparation.sources.sample_labels import join_labels


@dataclass(frozen=True)
class ListedClip:
    """A clip of a published list.

    Attributes:
        names: names that its file may have, without extension; the usual one first.
        labels: its classes.
        split: name of its split.
        where: file and line of the list, for messages.
        start_s, end_s: interval of the file in seconds; None: to the end.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    split: str
    where: str
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class PublishedList(ABC):
    """A published list and a directory of its media files, at any depth.

    A dataset is a subclass with `name`, a description and an example for the command line, and `read_clips`.

    Attributes:
        lists: the published lists, or the directory of them.
        media: directory of the media files.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    example: ClassVar[str]
    default_encoding: ClassVar[Encoding] = Encoding(clip_s=10.0)
    clip_seconds: ClassVar[float | None] = None
    suffixes: ClassVar[tuple[str, ...]] = VIDEO_SUFFIXES
    media_option: ClassVar[str] = "--videos"
    multi_label: ClassVar[bool] = False

    lists: tuple[Path, ...]
    media: Path

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the lists and the directory of the files; subclasses add more."""
        cls.add_list_argument(parser)
        parser.add_argument(
            cls.media_option,
            dest="media",
            type=Path,
            required=True,
            metavar="DIR",
            help="directory of the media files, at any depth; OUT.missing.csv lists those that it does not contain",
        )

    @classmethod
    def add_list_argument(cls, parser: argparse.ArgumentParser) -> None:
        """Add the published list."""
        parser.add_argument("lists", type=Path, nargs=1, metavar="LIST", help="the published list")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options, and report missing files."""
        source = cls.create(options)
        source.report_missing(options.out)
        return source

    @classmethod
    def create(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options; subclasses with more options override it."""
        return cls(tuple(options.lists), options.media)

    @abstractmethod
    def read_clips(self) -> list[ListedClip]:
        """Return the clips of all lists.

        Raises:
            UserError: for a list that is missing or has another format; the message names file and line.
        """

    def classes(self, clips: Iterable[ListedClip]) -> list[str]:
        """Return the classes in the order of their indices; by default those of the clips, sorted."""
        return sorted({label for clip in clips for label in clip.labels})

    def candidates(self) -> list[ClipSource]:
        """Return all listed clips, also those whose file is missing.

        Raises:
            UserError: for a list that is missing or has another format.
        """
        return [self._candidate(clip, file) for clip, file in self._files()]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Decode the file and cut it into clips."""
        if candidate.detail:
            raise RejectedClip(str(candidate.detail[0]))
        return decode_clips(self.media / candidate.source, candidate, encoding)

    def info(self) -> SourceInfo:
        """Return the classes, also those without a file."""
        return SourceInfo(self.classes(self.read_clips()), self.multi_label)

    def report_missing(self, out: Path) -> None:
        """Print how many files are missing and write their list to `OUT.missing.csv`, beside the dataset.

        Raises:
            UserError: if all files are missing, or if a list has another format.
        """
        files = self._files()
        missing = [clip for clip, file in files if file is None]
        report = out.with_name(f"{out.name}.missing.csv")
        if not missing:
            report.unlink(missing_ok=True)
            return
        names = format_list((clip.names[0] for clip in missing), limit=3)
        if len(missing) == len(files):
            raise UserError(
                f"{self.media_option} {self.media}: contains none of the {len(files)} listed files, e.g. {names}; "
                f"other allowed names of the first one: {format_list(missing[0].names[1:]) or 'none'}."
            )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("name", "label", "split", "listed_in"))
        for clip in missing:
            writer.writerow((clip.names[0], join_labels(clip.labels, clip.where), clip.split, clip.where))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(report, text.getvalue().encode())
        print(
            f"{self.name}: {len(missing)} of {len(files)} listed files are missing in {self.media}: {names}; "
            f"the list is in {report}",
            file=sys.stderr,
        )

    def _files(self) -> list[tuple[ListedClip, str | None]]:
        """Return each clip with the path of its file in the directory; None if it is missing.

        Raises:
            UserError: if the lists have no clips, or if one file would be two different clips.
        """
        if not self.media.is_dir():
            raise UserError(f"{self.media_option} {self.media}: no such directory.")
        index = _paths_by_stem(self.media, self.suffixes)
        files = []
        owners: dict[tuple[str, float], ListedClip] = {}
        for clip in self.read_clips():
            paths = next((index[name] for name in clip.names if name in index), ())
            file = next((path for path in paths if _in_class_folder(path, clip)), paths[0] if paths else None)
            if file is not None:
                owner = owners.setdefault((file, clip.start_s), clip)
                if owner.names[0] != clip.names[0]:
                    raise UserError(
                        f"{clip.where}: {file} is also the file of {owner.where}, another interval of the same video; "
                        "name files by ID and start time, or use --untrimmed if they are complete videos."
                    )
            files.append((clip, file))
        if not files:
            raise UserError(f"{self.name} {format_list(self.lists)}: no clips.")
        return files

    def _candidate(self, clip: ListedClip, file: str | None) -> ClipSource:
        label = join_labels(clip.labels, clip.where)
        if file is None:
            reason = f"missing: no file {clip.names[0]}.* in {self.media}; listed in {clip.where}"
            return ClipSource(clip.names[0], label, clip.split, clip.start_s, clip.end_s, (reason,))
        return ClipSource(file, label, clip.split, clip.start_s, clip.end_s)


@lru_cache(maxsize=2)
def _paths_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the paths of the media files below a directory, relative to it, by name without extension."""
    paths: dict[str, list[str]] = defaultdict(list)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(suffixes):
                paths[os.path.splitext(name)[0]].append(os.path.relpath(os.path.join(parent, name), folder))
    return dict(paths)


def _in_class_folder(path: str, clip: ListedClip) -> bool:
    return Path(path).parent.name.replace("_", " ") in {label.replace("_", " ") for label in clip.labels}


def read_rows(path: Path, num_cells: int, example: str, comment: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield file and line, and the cells of each row of a CSV file without header.

    Args:
        path: the file.
        num_cells: cells of a row.
        example: a row, for messages.
        comment: first characters of lines to skip; empty: none.

    Raises:
        UserError: for a missing file, or a row with another number of cells.
    """
    text = read_utf8(path, str(path))
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or (comment and line.startswith(comment)):
            continue
        where = f"{path}, line {number}"
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True, strict=True))]
        except csv.Error as error:
            raise UserError(f"{where}: {line[:80]!r} cannot be read ({error}); needed: {example}.") from None
        if len(cells) != num_cells or not all(cells):
            raise UserError(f"{where}: {line[:80]!r}; needed: {num_cells} cells without empty ones: {example}.")
        yield where, cells


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield file and line number, and the text of each line that is not blank.

    Raises:
        UserError: for a missing file.
    """
    for number, line in enumerate(read_utf8(path, str(path)).splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()
