"""Published lists of YouTube clips: VGGSound, Kinetics, Kinetics-Sounds and AudioSet."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from distav.config.errors import UserError, format_list
from distav.data.annotations.tables import TableFormat, read_csv
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.published.listed_clips import ListedClip, PublishedList, read_rows
from distav.data.preparation.sources.split_patterns import SplitPattern

CLIP_S = 10.0
"""Duration of the clips of VGGSound, AudioSet and Kinetics in seconds."""
KINETICS_SOUNDS = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing",
    "mowing lawn", "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet",
    "playing drums", "playing guitar", "playing harmonica", "playing keyboard", "playing organ", "playing piano",
    "playing saxophone", "playing trombone", "playing trumpet", "playing violin", "playing xylophone",
    "ripping paper", "shoveling snow", "shuffling cards", "singing", "stomping grapes", "strumming guitar",
    "tap dancing", "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip
"""The 32 classes that are used as Kinetics-Sounds with the published lists of Kinetics-400.

Arandjelovic and Zisserman (2017), "Look, Listen and Learn", chose 34 classes of an earlier version of Kinetics, whose
names were changed since. This is the list of Sarkar and Etemad (2023), "CrissCross". Panda et al. (2021), "AdaMML", and
others use 31 of these classes, without strumming guitar.
"""
_KINETICS_FORMAT = TableFormat(
    "label,youtube_id,time_start,time_end,split",
    ("label", "youtube_id", "time_start", "time_end", "split"),
    others_allowed=True,
)
_SPLITS = {"validate": "val", "validation": "val"}


@dataclass(frozen=True)
class YouTubeList(PublishedList):
    """A published list of intervals of YouTube videos.

    Attributes:
        untrimmed: whether the files are complete videos, named by the ID, of which the interval is cut out.
    """

    untrimmed: bool = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the lists, the directory of the videos and `--untrimmed`."""
        super().add_arguments(parser)
        parser.add_argument(
            "--untrimmed",
            action="store_true",
            help="the files are complete videos named ID.*, of which the intervals are cut out (default: the files are "
            "the clips, named ID_START_END.*, ID_START.* or ID.*)",
        )

    @classmethod
    def create(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(tuple(options.lists), options.media, options.untrimmed)

    def listed_clip(
        self, youtube_id: str, start: str, end: str | None, labels: tuple[str, ...], split: str, where: str
    ) -> ListedClip:
        """Return a clip; without `end` it has the usual duration.

        Raises:
            UserError: for times that are not seconds, or an end that is not after the start.
        """
        try:
            start_s = float(start)
            end_s = start_s + CLIP_S if end is None else float(end)
        except ValueError as error:
            raise UserError(f"{where}: start and end have to be seconds; {error}.") from None
        if not 0 <= start_s < end_s < math.inf:
            raise UserError(f"{where}: start {start} and end {end}; allowed: a start of at least 0 and a larger end.")
        if self.untrimmed:
            return ListedClip((youtube_id,), labels, split, where, start_s, end_s)
        return ListedClip(_file_names(youtube_id, int(start_s), int(end_s)), labels, split, where)


def _file_names(youtube_id: str, start: int, end: int) -> tuple[str, ...]:
    """Return the names that tools give to the file of a clip; AudioSet tools also use milliseconds and a leading Y."""
    return (
        f"{youtube_id}_{start:06d}_{end:06d}",
        f"{youtube_id}_{start:06d}",
        f"{youtube_id}_{start}_{end}",
        f"{youtube_id}_{start}",
        f"{youtube_id}_{start * 1000}_{end * 1000}",
        youtube_id,
        f"Y{youtube_id}",
    )


@dataclass(frozen=True)
class VGGSoundList(YouTubeList):
    """`vggsound`: vggsound.csv with rows of YouTube ID, start in seconds, label and split, without header."""

    name: ClassVar[str] = "vggsound"
    description: ClassVar[str] = "VGGSound: vggsound.csv and a directory of its clips."
    example: ClassVar[str] = "make_shards.py vggsound vggsound.csv shards/vggsound --videos vggsound/video --codec h264"

    def read_clips(self) -> list[ListedClip]:
        """Return the rows.

        Raises:
            UserError: for a missing file or an invalid row.
        """
        clips = []
        for path in self.lists:
            for where, (youtube_id, start, label, split) in read_rows(path, 4, "ID,30,label,train"):
                if split not in ("train", "test"):
                    raise UserError(f"{where}: split '{split}'; allowed: train, test.")
                clips.append(self.listed_clip(youtube_id, start, None, (label,), split, where))
        return clips


@dataclass(frozen=True)
class KineticsList(YouTubeList):
    """`kinetics`: lists with the columns label, youtube_id, time_start, time_end and split; others are ignored."""

    name: ClassVar[str] = "kinetics"
    description: ClassVar[str] = "Kinetics: lists with a header (official or CVDF) and a directory of the clips."
    example: ClassVar[str] = "make_shards.py kinetics train.csv val.csv shards/kinetics --videos k400 --codec h264"

    @classmethod
    def add_list_argument(cls, parser: argparse.ArgumentParser) -> None:
        """Add the lists."""
        parser.add_argument("lists", type=Path, nargs="+", metavar="LIST", help=f"csv: {_KINETICS_FORMAT.header}")

    def read_clips(self) -> list[ListedClip]:
        """Return the rows of all lists.

        Raises:
            UserError: for a missing file, a missing column or an invalid row.
        """
        clips = []
        for path in self.lists:
            table = read_csv(path, f"{self.name} {path}", _KINETICS_FORMAT)
            columns = (table.columns[column] for column in _KINETICS_FORMAT.required)
            for row, (label, youtube_id, start, end, split) in enumerate(zip(*columns, strict=True)):
                where = table.position(row)
                if not (label and youtube_id and split):
                    raise UserError(f"{where}: label, youtube_id and split may not be empty.")
                split = _SPLITS.get(split) or split
                clips.append(self.listed_clip(youtube_id, start, end, (label,), split, where))
        return clips


@dataclass(frozen=True)
class KineticsSoundsList(KineticsList):
    """`kinetics-sounds`: the clips of Kinetics lists that belong to the 32 classes of Kinetics-Sounds."""

    name: ClassVar[str] = "kinetics-sounds"
    description: ClassVar[str] = "Kinetics-Sounds: the clips of Kinetics-400 lists in its 32 classes."
    example: ClassVar[str] = "make_shards.py kinetics-sounds train.csv val.csv shards/ks --videos k400 --codec h264"

    def read_clips(self) -> list[ListedClip]:
        """Return the rows of all lists in these classes.

        Raises:
            UserError: as `KineticsList.read_clips`, or if a class does not occur.
        """
        clips = [clip for clip in super().read_clips() if clip.labels[0] in KINETICS_SOUNDS]
        absent = sorted(set(KINETICS_SOUNDS) - {clip.labels[0] for clip in clips})
        if absent:
            raise UserError(
                f"{self.name} {format_list(self.lists)}: no clips of {len(absent)} of the {len(KINETICS_SOUNDS)} "
                f"classes: {format_list(absent)}; use the lists of Kinetics-400."
            )
        return clips


@dataclass(frozen=True)
class AudioSetList(YouTubeList):
    """`audioset`: segment lists with several labels per clip, and the names of the labels.

    Attributes:
        splits: split of each list.
        class_names: class_labels_indices.csv.
        first_label: whether to use only the first label of a clip.
    """

    name: ClassVar[str] = "audioset"
    description: ClassVar[str] = "AudioSet: segment lists with several labels per clip, and a directory of the clips."
    example: ClassVar[str] = (
        "make_shards.py audioset balanced_train_segments.csv eval_segments.csv shards/audioset --videos audioset/video"
    )

    splits: tuple[str, ...] = ()
    class_names: Path = Path("class_labels_indices.csv")
    first_label: bool = False

    @classmethod
    def add_list_argument(cls, parser: argparse.ArgumentParser) -> None:
        """Add the lists, `--class-names` and `--first-label`."""
        add = parser.add_argument
        add(
            "lists",
            nargs="+",
            metavar="LIST",
            help="[SPLIT=]FILE (default split: train or test, if the file name has 'train' or 'eval' in it)",
        )
        add(
            "--class-names",
            type=Path,
            metavar="FILE",
            help="class_labels_indices.csv (default: in the directory of the first list)",
        )
        add("--first-label", action="store_true", help="use only the first label of a clip")

    @classmethod
    def create(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options.

        Raises:
            UserError: if the split of a list is not given and not part of its file name.
        """
        patterns = [SplitPattern.parse(text) for text in options.lists]
        lists = tuple(Path(pattern.pattern) for pattern in patterns)
        splits = tuple(pattern.split or _audioset_split(pattern.pattern) for pattern in patterns)
        class_names = options.class_names or lists[0].parent / "class_labels_indices.csv"
        return cls(lists, options.media, options.untrimmed, splits, class_names, options.first_label)

    def read_clips(self) -> list[ListedClip]:
        """Return the segments of all lists.

        Raises:
            UserError: for a missing file, an invalid row or an unknown label.
        """
        names = self._names_by_id()
        clips = []
        for path, split in zip(self.lists, self.splits, strict=True):
            example = 'ID, 30.000, 40.000, "/m/09x0r,/t/dd00088"'
            for where, (youtube_id, start, end, label_ids) in read_rows(path, 4, example, comment="#"):
                ids = [label_id.strip() for label_id in label_ids.split(",")]
                unknown = [label_id for label_id in ids if label_id not in names]
                if unknown:
                    raise UserError(f"{where}: label '{unknown[0]}' is not in {self.class_names}.")
                labels = tuple(dict.fromkeys(names[label_id] for label_id in ids))
                labels = labels[:1] if self.first_label else labels
                clips.append(self.listed_clip(youtube_id, start, end, labels, split, where))
        return clips

    def classes(self, clips: Iterable[ListedClip]) -> list[str]:
        """Return all classes in the order of class_labels_indices.csv."""
        del clips
        return list(self._names_by_id().values())

    def info(self) -> SourceInfo:
        """Return the classes; clips have several unless only the first label is used."""
        return SourceInfo(self.classes(()), not self.first_label)

    def _names_by_id(self) -> dict[str, str]:
        table: Any = read_csv(
            self.class_names,
            f"--class-names {self.class_names}",
            TableFormat("index,mid,display_name", ("index", "mid", "display_name")),
        )
        return dict(zip(table.columns["mid"], table.columns["display_name"], strict=True))


def _audioset_split(path: str) -> str:
    name = Path(path).name
    for part, split in (("train", "train"), ("eval", "test")):
        if part in name:
            return split
    raise UserError(f"audioset {path}: the split is not part of the file name; give it as SPLIT={path}.")
