"""Annotations of LLP (Look, Listen and Parse; Tian et al. 2020): audible and visible events with start and end.

Legend: N videos, T segments of one second, C classes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list
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

    Raises:
        UserError: for an unknown split, a missing file or column, or a class or time that LLP does not have.
    """
    if split not in VIDEOS:
        raise UserError(f"split {split}: LLP has {format_list(VIDEOS)}.{did_you_mean(split, VIDEOS)}")
    rows = _read(folder / VIDEOS[split], ("filename", "event_labels"))
    row_of = {row["filename"]: number for number, row in enumerate(rows)}
    weak = np.zeros((len(rows), len(CLASSES)), dtype=bool)
    for number, row in enumerate(rows):
        for label in row["event_labels"].split(","):
            weak[number, _class_index(label, folder / VIDEOS[split])] = True
    if split == "train":
        return LLPAnnotations(list(row_of), weak, None)
    events = np.zeros((len(rows), len(MODALITIES), DURATION_S, len(CLASSES)), dtype=bool)
    for modality, name in enumerate(MODALITIES):
        path = folder / EVENTS[name]
        for row in _read(path, ("filename", "onset", "offset", "event_labels")):
            number = row_of.get(row["filename"])
            start, end = _second(row["onset"], path), _second(row["offset"], path)
            label = _class_index(row["event_labels"], path)
            if number is not None:
                events[number, modality, start:end, label] = True
    return LLPAnnotations(list(row_of), weak, events)


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the directory with LLP's published CSV files.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise UserError(
                f"{path}: column '{min(missing)}' is missing; LLP's files have the tab-separated columns "
                f"{format_list(columns)}."
            )
        return list(reader)


def _class_index(label: str, path: Path) -> int:
    if label not in CLASSES:
        raise UserError(f"{path}: '{label}' is not a class of LLP.{did_you_mean(label, CLASSES)}")
    return CLASSES.index(label)


def _second(text: str, path: Path) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= DURATION_S:
        raise UserError(f"{path}: '{text}' is not a time; allowed: whole seconds from 0 to {DURATION_S}.")
    return int(text)
