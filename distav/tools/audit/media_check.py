"""Clips without usable content: silent, black, still or unreadable.

Legend: N training clips.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from distav.data.dataset import Split
from distav.tools.inspect_shards.measurements import measure

TRAITS = ("silent", "black", "still")
MAX_STILL_FRACTION = 0.2
"""Fraction of still clips up to which they are listed; a dataset with more consists of still images on purpose."""


@dataclass(frozen=True)
class MediaCheck:
    """Measured properties of the training clips.

    Attributes:
        traits: by name, `silent`, `black` or `still`: [N] bool.
        unreadable: [N] object, reason why a clip cannot be decoded, or empty.
        measured: whether the clips were decoded; otherwise all properties are false.
    """

    traits: dict[str, np.ndarray]
    unreadable: np.ndarray
    measured: bool

    @classmethod
    def skipped(cls, num_clips: int) -> "MediaCheck":
        """Return the result for clips that are not decoded."""
        traits = {name: np.zeros(num_clips, dtype=bool) for name in TRAITS}
        return cls(traits, np.full(num_clips, "", dtype=object), False)

    @classmethod
    def measure(cls, split: Split, workers: int) -> "MediaCheck":
        """Decode and measure all clips of a split in several processes."""
        return cls.from_rows(measure(split.root, split, np.arange(len(split)), workers), len(split))

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]], num_clips: int) -> "MediaCheck":
        """Return the result for measurements of all clips."""
        check = cls.skipped(num_clips)
        for row in rows:
            clip = row["id"]
            for name in TRAITS:
                check.traits[name][clip] = bool(row.get(name))
            if "damaged" in row:
                check.unreadable[clip] = "; ".join(row["damaged"].values())
            check.unreadable[clip] = row.get("undecodable", check.unreadable[clip])
        return cls(check.traits, check.unreadable, True)

    @property
    def without_content(self) -> dict[str, np.ndarray]:
        """Clips whose modality has no content that could be compared: [N] bool by modality."""
        return {"visual": self.traits["black"], "audio": self.traits["silent"]}

    def issues(self) -> tuple[np.ndarray, list[str]]:
        """Return which clips are listed, [N] bool, and the reasons of each clip as text."""
        listed = {name: values for name, values in self.traits.items() if values.any()}
        if "still" in listed and listed["still"].mean() > MAX_STILL_FRACTION:
            del listed["still"]
        texts: list[str] = []
        for clip, reason in enumerate(self.unreadable):
            names = [name for name, values in listed.items() if values[clip]]
            texts.append(", ".join(names + ([f"unreadable: {reason}"] if reason else [])))
        return np.array([bool(text) for text in texts], dtype=bool), texts
