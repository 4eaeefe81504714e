"""Published splits of UCF101 and HMDB51."""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Self

from distav.config.errors import UserError
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.published.listed_clips import ListedClip, PublishedList, read_lines

FOLDS = (1, 2, 3)


@dataclass(frozen=True)
class FoldedLists(PublishedList):
    """A directory of lists for several folds.

    Attributes:
        fold: the fold, from 1.
    """

    folds: ClassVar[tuple[int, ...]] = FOLDS

    fold: int = 1

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the lists, the directory of the files and `--fold`."""
        super().add_arguments(parser)
        parser.add_argument(
            "--fold", type=int, default=1, choices=cls.folds, help="published fold (default: %(default)s)"
        )

    @classmethod
    def add_list_argument(cls, parser: argparse.ArgumentParser) -> None:
        """Add the directory of the lists."""
        parser.add_argument("lists", type=Path, nargs=1, metavar="LISTS", help="directory of the published lists")

    @classmethod
    def create(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(tuple(options.lists), options.media, options.fold)


@dataclass(frozen=True)
class UCF101Lists(FoldedLists):
    """`ucf101`: classInd.txt, trainlist0N.txt and testlist0N.txt."""

    name: ClassVar[str] = "ucf101"
    description: ClassVar[str] = "UCF101: the published lists of a fold and a directory of the videos."
    example: ClassVar[str] = "make_shards.py ucf101 ucfTrainTestlist shards/ucf101 --videos UCF-101 --fold 1"
    default_encoding: ClassVar[Encoding] = Encoding()

    def read_clips(self) -> list[ListedClip]:
        """Return the videos of both lists of the fold.

        Raises:
            UserError: for a missing file or an invalid line.
        """
        class_names = self._class_names()
        indices = {name: index for index, name in class_names.items()}
        clips = []
        for split in ("train", "test"):
            for where, line in read_lines(self.lists[0] / f"{split}list{self.fold:02d}.txt"):
                path, _, index = line.partition(" ")
                class_name = PurePosixPath(path).parent.name
                if class_name not in indices or (split == "train" and index.strip() != indices[class_name]):
                    expected = f"{class_name} {indices.get(class_name, '(not in classInd.txt)')}"
                    raise UserError(
                        f"{where}: '{line[:80]}'; needed: CLASS/NAME.avi{' INDEX' if split == 'train' else ''}, as in "
                        f"classInd.txt: {expected}."
                    )
                clips.append(ListedClip((PurePosixPath(path).stem,), (class_name,), split, where))
        return clips

    def classes(self, clips: Iterable[ListedClip]) -> list[str]:
        """Return all classes in the order of classInd.txt."""
        del clips
        return list(self._class_names().values())

    def _class_names(self) -> dict[str, str]:
        """Return class names by index."""
        names = {}
        for where, line in read_lines(self.lists[0] / "classInd.txt"):
            index, _, name = line.partition(" ")
            if not index.isdecimal() or not name or index in names:
                raise UserError(f"{where}: '{line[:80]}'; needed: INDEX CLASS, each index once.")
            names[index] = name.strip()
        return names


@dataclass(frozen=True)
class HMDB51Lists(FoldedLists):
    """`hmdb51`: CLASS_test_splitN.txt with a line `NAME.avi 1` (train), `2` (test) or `0` (not used) per video."""

    name: ClassVar[str] = "hmdb51"
    description: ClassVar[str] = "HMDB51: the published lists of a fold and a directory of the videos."
    example: ClassVar[str] = "make_shards.py hmdb51 testTrainMulti_7030_splits shards/hmdb51 --videos hmdb51 --fold 1"
    default_encoding: ClassVar[Encoding] = Encoding(clip_s=1.0)

    def read_clips(self) -> list[ListedClip]:
        """Return the used videos of the lists of all classes.

        Raises:
            UserError: if there are no lists of the fold, or for an invalid line.
        """
        pattern = f"*_test_split{self.fold}.txt"
        lists = sorted(self.lists[0].glob(pattern))
        if not lists:
            raise UserError(f"hmdb51 {self.lists[0]}: contains no {pattern}.")
        clips = []
        for path in lists:
            class_name = path.name.removesuffix(pattern[1:])
            for where, line in read_lines(path):
                match = re.fullmatch(r"(.+)\.avi\s+([012])", line)
                if not match:
                    raise UserError(
                        f"{where}: '{line[:80]}'; needed: NAME.avi and 1 (train), 2 (test) or 0 (not used)."
                    )
                if match[2] != "0":
                    split = {"1": "train", "2": "test"}[match[2]]
                    clips.append(ListedClip((match[1],), (class_name,), split, where))
        return clips
