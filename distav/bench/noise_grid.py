"""The grid of the noise benchmark: sets, noise rates, methods, and the trainings that they come to."""

import re
from dataclasses import dataclass

METHODS = {
    "distav": "avdigits",
    "ce": "baselines/ce",
    "gce": "baselines/gce",
    "elr": "baselines/elr",
    "true labels": "baselines/true_labels",
    "ce after contrast": "baselines/ce_after_contrast",
    "contrast + probe": "baselines/contrast_probe",
    "infonce + probe": "baselines/infonce_probe",
}
SIMPLE = ("ce", "gce", "elr")
"""The baselines that distav has to beat wherever they are asked for."""
SHARES_PHASE_1 = ("distav", "ce after contrast", "contrast + probe")
SETS = {"easy": (), "hard": ("--degrade",), "speaker held out": ("--hold-out-speaker", "theo")}


@dataclass(frozen=True)
class Cell:
    """One place of the grid: a set, its label noise, and its share of mismatched pairs."""

    set: str
    labels: str
    pairs: float

    @property
    def name(self) -> str:
        """A name for people and files."""
        return f"{self.set}, {self.labels or 'right labels'}, pairs {self.pairs:g}"


def file_name(text: str) -> str:
    """Return a text as the name of a file or folder."""
    return re.sub(r"[ :+]+", "-", text.replace(", ", "_"))


def grid() -> list[tuple[Cell, tuple[str, ...]]]:
    """Return every cell with the methods that are compared there."""
    rates = ("symmetric:0.2", "symmetric:0.4", "symmetric:0.6")
    found = [(Cell("easy", "symmetric:0.8", 0.4), tuple(METHODS))]
    found += [(Cell("easy", "symmetric:0.8", 0.0), ("distav", *SIMPLE))]
    found += [(Cell("easy", "asymmetric:0.4", 0.4), ("distav", *SIMPLE))]
    found += [(Cell("easy", "", 0.0), ("distav", "ce", "true labels"))]
    found += [
        (Cell("hard", labels, pairs), ("distav", *SIMPLE))
        for pairs in (0.4, 0.0)
        for labels in ("symmetric:0.2", "symmetric:0.8", "symmetric:0.4", "symmetric:0.6")
    ]
    found += [(Cell("easy", labels, pairs), ("distav",)) for labels in rates for pairs in (0.0, 0.2, 0.4)]
    found += [(Cell("speaker held out", "symmetric:0.6", 0.4), ("distav", *SIMPLE))]
    return found


@dataclass(frozen=True)
class Job:
    """One training: a method in a cell with a seed; or the phase 1 that several start from."""

    cell: Cell
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder and of its result."""
        return file_name(f"{self.cell.name}, {self.method}, seed {self.seed}")

    @property
    def phase_1(self) -> "Job | None":
        """The job that it starts from."""
        if self.method not in SHARES_PHASE_1:
            return None
        return Job(Cell(self.cell.set, "", self.cell.pairs), "phase 1", self.seed)
