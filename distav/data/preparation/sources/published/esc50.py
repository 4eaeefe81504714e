"""ESC-50: environmental recordings without video."""

import argparse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from distav.config.errors import UserError
from distav.data.annotations.tables import TableFormat, read_csv
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.published.actions import FoldedLists
from distav.data.preparation.sources.published.listed_clips import ListedClip

DURATION_S = 5.0
_FORMAT = TableFormat(
    "filename,fold,target,category,esc10,src_file,take", ("filename", "fold", "category"), others_allowed=True
)


@dataclass(frozen=True)
class ESC50List(FoldedLists):
    """`esc50`: esc50.csv and its WAV files; one fold is the test split. Clips have no video."""

    name: ClassVar[str] = "esc50"
    description: ClassVar[str] = "ESC-50: esc50.csv and a directory of WAV files (audio without video)."
    example: ClassVar[str] = "make_shards.py esc50 ESC-50/meta/esc50.csv shards/esc50 --audio ESC-50/audio --fold 5"
    default_encoding: ClassVar[Encoding] = Encoding(clip_s=DURATION_S, modalities="any")
    suffixes: ClassVar[tuple[str, ...]] = (".wav",)
    media_option: ClassVar[str] = "--audio"
    folds: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5)
    allowed_modalities: ClassVar[tuple[str, ...]] = ("any",)

    @classmethod
    def add_list_argument(cls, parser: argparse.ArgumentParser) -> None:
        """Add the list."""
        parser.add_argument("lists", type=Path, nargs=1, metavar="LIST", help=f"csv: {_FORMAT.header}")

    def read_clips(self) -> list[ListedClip]:
        """Return the rows of the list.

        Raises:
            UserError: for a missing file, a missing column or an invalid row.
        """
        table = read_csv(self.lists[0], f"esc50 {self.lists[0]}", _FORMAT)
        columns = (table.columns[column] for column in _FORMAT.required)
        clips = []
        for row, (file, fold, label) in enumerate(zip(*columns, strict=True)):
            where = table.position(row)
            if fold not in map(str, self.folds) or not file or not label:
                raise UserError(f"{where}: fold '{fold}' of '{file}', category '{label}'; allowed: folds 1 to 5.")
            split = "test" if fold == str(self.fold) else "train"
            clips.append(ListedClip((PurePosixPath(file).stem,), (label,), split, where))
        return clips
