"""Annotations of LLP (Look, Listen and Parse; Tian et al. 2020): audible and visible events with start and end.

Legend: N videos, T segments of one second, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.tables import Table, TableFormat, read_csv
from distav.data.modalities import MODALITIES

DURATION_S = 10
CLASSES = (
    "Speech", "Car", "Cheering", "Dog", "Cat", "Frying_(food)", "Basketball_bounce", "Fire_alarm", "Chainsaw", "Cello",
    "Banjo", "Singing", "Chicken_rooster", "Violin_fiddle", "Vacuum_cleaner", "Baby_laughter", "Accordion",
    "Lawn_mower", "Motorcycle", "Helicopter", "Acoustic_guitar", "Telephone_bell_ringing", "Baby_cry_infant_cry",
    "Blender", "Clapping",
)  # fmt: skip
"""Class names, in the order used by all published results."""
VIDEOS = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
"""File with the videos and weak labels of each split."""
EVENTS = {"audio": "AVVP_eval_audio.csv", "visual": "AVVP_eval_visual.csv"}
"""File with the events of each modality, for the validation and test split."""


@dataclass(frozen=True)
class LLPAnnotations:
    """Annotations of one split.

    Attributes:
        names: videos, as YouTube id with start and end.
        weak: [N, C] bool, events that occur in a video, audible or visible.
        events: [N, 2, T, C] bool, the seconds of each event per modality; None for the training split.
    """

    names: list[str]
    weak: np.ndarray
    events: np.ndarray | None


def read_llp(folder: Path, split: str) -> LLPAnnotations:
    """Read the published annotations of a split; ignores events of videos that the split does not list.

    A video with several rows has the classes of all of them.

    Raises:
        UserError: for an unknown split, a missing file or column, or a class or time that LLP does not have.
    """
    if split not in VIDEOS:
        raise UserError(f"split {split}: LLP has {format_list(VIDEOS)}.{did_you_mean(split, VIDEOS)}")
    table = _read(folder / VIDEOS[split], ("filename", "event_labels"))
    row_of: dict[str, int] = {}
    for name in table.columns["filename"]:
        row_of.setdefault(name, len(row_of))
    weak = np.zeros((len(row_of), len(CLASSES)), dtype=bool)
    for row, (name, labels) in enumerate(zip(table.columns["filename"], table.columns["event_labels"], strict=True)):
        for label in labels.split(","):
            weak[row_of[name], _class_index(label, table.position(row))] = True
    if split == "train":
        return LLPAnnotations(list(row_of), weak, None)
    events = np.zeros((len(row_of), len(MODALITIES), DURATION_S, len(CLASSES)), dtype=bool)
    for modality, name in enumerate(MODALITIES):
        table = _read(folder / EVENTS[name], ("filename", "onset", "offset", "event_labels"))
        columns = zip(*table.columns.values(), strict=True)
        for row, (video, onset, offset, label) in enumerate(columns):
            where = table.position(row)
            start, end, label_index = _second(onset, where), _second(offset, where), _class_index(label, where)
            if video in row_of:
                events[row_of[video], modality, start:end, label_index] = True
    return LLPAnnotations(list(row_of), weak, events)


def _read(path: Path, columns: tuple[str, ...]) -> Table:
    """Return the columns of one of LLP's files, in this order."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the directory with LLP's published CSV files.")
    table = read_csv(path, str(path), TableFormat("<TAB>".join(columns), columns, (), True, "\t"))
    return Table(table.name, {column: table.columns[column] for column in columns}, table.row_unit, table.row_numbers)


def _class_index(label: str, where: str) -> int:
    if label not in CLASSES:
        raise UserError(f"{where}: '{label}' is not a class of LLP.{did_you_mean(label, CLASSES)}")
    return CLASSES.index(label)


def _second(text: str, where: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= DURATION_S:
        raise UserError(f"{where}: '{text}' is not a time; allowed: whole seconds from 0 to {DURATION_S}.")
    return int(text)
