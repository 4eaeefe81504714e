"""The grid of the noise benchmark: sets, noise rates, methods, ablations, and the trainings that they come to."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A configuration under configs/, with changes, that may start from the phase 1 that others have had too."""

    config: str
    changes: tuple[str, ...] = ()
    shares_phase_1: bool = False


TRUE_LABELS = "true labels"
"""The method that shows what could be reached, and that no other is compared with."""

METHODS = {
    "distav": Method("avdigits", shares_phase_1=True),
    "ce": Method("baselines/ce"),
    "gce": Method("baselines/gce"),
    "elr": Method("baselines/elr"),
    TRUE_LABELS: Method("baselines/true_labels"),
    "ce after contrast": Method("baselines/ce_after_contrast", shares_phase_1=True),
    "contrast + probe": Method("baselines/contrast_probe", shares_phase_1=True),
    "infonce + probe": Method("baselines/infonce_probe"),
    "robust-xid + probe": Method("ravid"),
}
SIMPLE = ("ce", "gce", "elr")
"""The baselines that distav has to beat wherever they are asked for."""


def _contrast_alone(*changes: str) -> Method:
    changes = ("temperature=0.3", "within_modal_weight=1", *changes)
    return Method("baselines/infonce_probe", ("~phases.probe", *(f"phases.contrastive.{each}" for each in changes)))


PAIR_METHODS = {
    "infonce, across alone": _contrast_alone("negatives_source=batch", "within_modal_weight=0"),
    "infonce": _contrast_alone("negatives_source=batch"),
    "weighted xid, cdf": _contrast_alone("correspondence_estimator=cdf"),
    "weighted xid, gmm": _contrast_alone("correspondence_estimator=gmm"),
    "crcl": Method("crcl", ("~phases.probe",)),
    "true pairs": _contrast_alone(
        "negatives_source=batch", "correspondence_estimator=oracle", "min_pair_weight=0", "pair_weighting_start=0"
    ),
}
"""Ways to learn from mismatched pairs without labels; the last one knows which they are.

All but the first have terms within each modality, too."""

CORRECTIONS = ("correct_1", "correct_2", "correct_3", "labels")
NO_CATEGORIES = ("category_weight=0", "category_balance_weight=0", "category_entropy_weight=0")


def _contrast(*changes: str) -> Method:
    return Method("avdigits", tuple(f"phases.contrastive.{change}" for change in changes))


def _votes(change: str) -> Method:
    return Method("avdigits", tuple(f"phases.{phase}.{change}" for phase in CORRECTIONS), shares_phase_1=True)


def _turns(*changes: str) -> Method:
    return Method("avdigits", changes, shares_phase_1=True)


ABLATIONS = {
    "no phase 1": Method("avdigits", ("~phases.contrastive",)),
    "no terms within a modality": _contrast("within_modal_weight=0"),
    "no category loss": _contrast(*NO_CATEGORIES),
    "no soft targets": _contrast("soft_targets=none"),
    "pairs all believed": _contrast("correspondence_estimator=none"),
    "pairs by cdf": _contrast("correspondence_estimator=cdf"),
    "pairs by categories": _contrast("correspondence_estimator=category"),
    "pairs by the truth": _contrast("correspondence_estimator=oracle"),
    "complementary loss": _contrast(
        "loss=acl",
        "negatives_source=batch",
        "temperature=0.3",
        "soft_targets=none",
        "correspondence_estimator=scc",
        "matching_reference_size=4",
        "full_trust_quantile=0.9",
    ),
    "no whitening": _votes("whitening_powers=[0.0]"),
    "no second vote": _votes("second_round_neighbors=[0]"),
    "k 20": _votes("num_neighbors=[20]"),
    "no turns": _turns(
        *(f"~phases.{phase}" for phase in ("learn_1", "correct_2", "learn_2", "correct_3")), "phases.learn_3.epochs=36"
    ),
    "own labels in turns": _turns("phases.learn_1.targets=posterior", "phases.learn_2.targets=posterior"),
    "cross-entropy last": _turns("phases.learn_3.loss=ce"),
}
"""The recipe with one component off or exchanged."""

PHASE_1 = "phase 1"
MOST_PAIRS = 0.4
"""The largest share of mismatched pairs."""
SETS = {
    "easy": (),
    "other classes": ("--cross-class-only",),
    "hard": ("--degrade",),
    "speaker held out": ("--hold-out-speaker", "theo"),
}


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
    found += [(Cell("easy", "", 0.0), ("distav", "ce", TRUE_LABELS))]
    found += [
        (Cell("hard", labels, pairs), ("distav", *SIMPLE))
        for pairs in (0.4, 0.0)
        for labels in ("symmetric:0.2", "symmetric:0.8", "symmetric:0.4", "symmetric:0.6")
    ]
    found += [(Cell("easy", labels, pairs), ("distav",)) for labels in rates for pairs in (0.0, 0.2, 0.4)]
    found += [(Cell("speaker held out", "symmetric:0.6", 0.4), ("distav", *SIMPLE))]
    return found


def ablations() -> list[tuple[Cell, tuple[str, ...]]]:
    """Return the cells where components are taken off, with the whole recipe beside."""
    return [(Cell(name, "symmetric:0.8", MOST_PAIRS), ("distav", *ABLATIONS)) for name in ("hard", "easy")]


def pairs() -> list[tuple[Cell, tuple[str, ...]]]:
    """Return the cells where sounds come from clips of other classes, with the ways to learn from them.

    Where no pair is wrong, knowing which are wrong changes nothing, and is left out.
    """
    told_nothing = tuple(each for each in PAIR_METHODS if each != "true pairs")
    return [
        (Cell("other classes", "", rate), tuple(PAIR_METHODS) if rate else told_nothing)
        for rate in (0.0, 0.2, 0.4, 0.6, 0.8)
    ]


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
        if self.method == PHASE_1 or not self.settings.shares_phase_1:
            return None
        return Job(Cell(self.cell.set, "", self.cell.pairs), PHASE_1, self.seed)

    @property
    def settings(self) -> Method:
        """What its method is."""
        return (METHODS | ABLATIONS | PAIR_METHODS)[self.method]
