"""ESC-50: environmental recordings without video."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import soundfile
from scipy.signal import resample_poly

from distav.config.errors import UserError
from distav.data.annotations.tables import TableFormat, read_csv
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.published.actions import FoldedLists
from distav.data.preparation.sources.published.listed_clips import ListedClip

DURATION_S = 5.0
_FORMAT = TableFormat(
    "filename,fold,target,category,esc10,src_file,take", ("filename", "fold", "category"), others_allowed=True
)


@dataclass(frozen=True)
class ESC50List(FoldedLists):
    """`esc50`: esc50.csv and its WAV files; one fold is the test split.

    The dataset format has no clips without video yet, so that `info` raises an error; `clips` yields clips without
    frames.
    """

    name: ClassVar[str] = "esc50"
    description: ClassVar[str] = "ESC-50: esc50.csv and a directory of WAV files (not supported yet: no video)."
    example: ClassVar[str] = "make_shards.py esc50 ESC-50/meta/esc50.csv shards/esc50 --audio ESC-50/audio --fold 5"
    default_encoding: ClassVar[Encoding] = Encoding(clip_s=DURATION_S)
    suffixes: ClassVar[tuple[str, ...]] = (".wav",)
    media_option: ClassVar[str] = "--audio"
    folds: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5)

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

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Read the recording and cut it into clips without frames."""
        if candidate.detail:
            raise RejectedClip(str(candidate.detail[0]))
        try:
            waveform, rate_hz = soundfile.read(self.media / candidate.source, dtype="float32", always_2d=True)
        except (OSError, soundfile.SoundFileError) as error:
            raise RejectedClip(f"not readable: {error}") from None
        waveform = resample_poly(waveform.mean(axis=1), encoding.sample_rate_hz, rate_hz).astype(np.float32)
        length = encoding.num_audio_samples
        if len(waveform) < length:
            raise RejectedClip(f"too short: {len(waveform) / encoding.sample_rate_hz:.2f} s of audio")
        for start in range(0, len(waveform) - length + 1, length):
            frames = np.zeros((0, 0, 0, 3), np.uint8)
            yield Clip(frames, waveform[start : start + length], start / encoding.sample_rate_hz)

    def info(self) -> SourceInfo:
        """Raise an error, because the dataset format has no clips without video yet.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"esc50 {self.lists[0]}: not supported yet: a dataset of clips without video; allowed: sources with video "
            "and audio."
        )
