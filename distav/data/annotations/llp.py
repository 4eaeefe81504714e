"""The annotations of LLP (Look, Listen and Parse; Tian et al. 2020): which events are heard, which seen, and when.

Legend: N videos, T segments of one second, C classes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list

DURATION_S = 10
CLASSES = (
    "Speech", "Car", "Cheering", "Dog", "Cat", "Frying_(food)", "Basketball_bounce", "Fire_alarm", "Chainsaw", "Cello",
    "Banjo", "Singing", "Chicken_rooster", "Violin_fiddle", "Vacuum_cleaner", "Baby_laughter", "Accordion",
    "Lawn_mower", "Motorcycle", "Helicopter", "Acoustic_guitar", "Telephone_bell_ringing", "Baby_cry_infant_cry",
    "Blender", "Clapping",
)  # fmt: skip
"""In the order that all published results number them."""
VIDEOS = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
EVENTS = ("AVVP_eval_audio.csv", "AVVP_eval_visual.csv")


@dataclass(frozen=True)
class LLPAnnotations:
    """One split.

    Attributes:
        names: of the videos, YouTube id with start and end.
        weak: [N, C] bool, events that occur in a video, be it heard or seen.
        events: [N, 2, T, C] bool, when they are heard and seen; None for the training split.
    """

    names: list[str]
    weak: np.ndarray
    events: np.ndarray | None


def read_llp(folder: Path, split: str) -> LLPAnnotations:
    """Read a split's annotations as published; events of videos that no list has are left out, as everyone does.

    Raises:
        UserError: for an unknown split, a missing file or column, or a class or time that LLP does not have.
    """
    if split not in VIDEOS:
        raise UserError(f"split {split}: LLP has {format_list(VIDEOS)}.{did_you_mean(split, VIDEOS)}")
    rows = _read(folder / VIDEOS[split], ("filename", "event_labels"))
    places = {row["filename"]: number for number, row in enumerate(rows)}
    weak = np.zeros((len(rows), len(CLASSES)), dtype=bool)
    for number, row in enumerate(rows):
        for label in row["event_labels"].split(","):
            weak[number, _class(label, folder / VIDEOS[split])] = True
    if split == "train":
        return LLPAnnotations(list(places), weak, None)
    events = np.zeros((len(rows), 2, DURATION_S, len(CLASSES)), dtype=bool)
    for modality, name in enumerate(EVENTS):
        for row in _read(folder / name, ("filename", "onset", "offset", "event_labels")):
            number = places.get(row["filename"])
            first, end = (_second(row[key], folder / name) for key in ("onset", "offset"))
            label = _class(row["event_labels"], folder / name)
            if number is not None:
                events[number, modality, first:end, label] = True
    return LLPAnnotations(list(places), weak, events)


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder with LLP's published CSV files.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise UserError(
                f"{path}: has no column '{min(missing)}'; LLP's files have {format_list(columns)}, with tabs."
            )
        return list(reader)


def _class(label: str, path: Path) -> int:
    if label not in CLASSES:
        raise UserError(f"{path}: '{label}' is no class of LLP.{did_you_mean(label, CLASSES)}")
    return CLASSES.index(label)


def _second(text: str, path: Path) -> int:
    if not text.isdigit() or not 0 <= int(text) <= DURATION_S:
        raise UserError(f"{path}: '{text}' is no second from 0 to {DURATION_S}.")
    return int(text)
