"""Experiments of the noise benchmark: datasets, noise rates, methods, ablations, and the trainings they consist of."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A configuration under configs/ with overrides.

    Attributes:
        config: path of the configuration without suffix.
        overrides: settings that replace those of the configuration.
        shares_pretraining: whether its first phase is the recipe's contrastive phase, which is then trained once for
            all methods of a dataset and seed.
    """

    config: str
    overrides: tuple[str, ...] = ()
    shares_pretraining: bool = False


TRUE_LABELS = "true labels"
"""The method that is trained with true labels: an upper bound, which is not compared with other methods."""

METHODS = {
    "distav": Method("avdigits", shares_pretraining=True),
    "CE": Method("baselines/ce"),
    "GCE": Method("baselines/gce"),
    "ELR": Method("baselines/elr"),
    "SOP": Method("baselines/sop"),
    "mixup": Method("baselines/mixup"),
    TRUE_LABELS: Method("baselines/true_labels"),
    "contrastive + CE": Method("baselines/ce_after_contrast", shares_pretraining=True),
    "contrastive + probe": Method("baselines/contrast_probe", shares_pretraining=True),
    "InfoNCE + probe": Method("baselines/infonce_probe"),
    "Robust-xID + probe": Method("ravid"),
}
BASELINES = ("CE", "GCE", "ELR")
"""The classification losses that distav is compared with in most cells."""


def _contrastive_only(*overrides: str) -> Method:
    overrides = ("temperature=0.3", "within_modal_weight=1", *overrides)
    settings = (f"phases.contrastive.{override}" for override in overrides)
    return Method("baselines/infonce_probe", ("~phases.probe", *settings))


PAIR_METHODS = {
    "InfoNCE, cross-modal only": _contrastive_only("negatives_source=batch", "within_modal_weight=0"),
    "InfoNCE": _contrastive_only("negatives_source=batch"),
    "weighted xID, CDF": _contrastive_only("correspondence_estimator=cdf"),
    "weighted xID, GMM": _contrastive_only("correspondence_estimator=gmm"),
    "CRCL": Method("crcl", ("~phases.probe",)),
    "true pairs": _contrastive_only(
        "negatives_source=batch", "correspondence_estimator=oracle", "min_pair_weight=0", "pair_weighting_start=0"
    ),
}
"""Methods that learn from mismatched pairs without labels; the last one is given the true pairs.

All but the first have within-modal terms.
"""
TRUE_PAIRS = "true pairs"

CORRECTIONS = ("correct_1", "correct_2", "correct_3", "labels")
"""Label correction phases of the recipe."""
NO_CATEGORIES = ("category_weight=0", "category_balance_weight=0", "category_entropy_weight=0")


def _contrastive(*overrides: str) -> Method:
    return Method("avdigits", tuple(f"phases.contrastive.{override}" for override in overrides))


def _votes(override: str) -> Method:
    overrides = tuple(f"phases.{phase}.{override}" for phase in CORRECTIONS)
    return Method("avdigits", overrides, shares_pretraining=True)


def _rounds(*overrides: str) -> Method:
    return Method("avdigits", overrides, shares_pretraining=True)


ABLATIONS = {
    "no contrastive pretraining": Method("avdigits", ("~phases.contrastive",)),
    "no within-modal loss": _contrastive("within_modal_weight=0"),
    "no category loss": _contrastive(*NO_CATEGORIES),
    "no soft targets": _contrastive("soft_targets=none"),
    "all pairs trusted": _contrastive("correspondence_estimator=none"),
    "correspondence by CDF": _contrastive("correspondence_estimator=cdf"),
    "correspondence by categories": _contrastive("correspondence_estimator=category"),
    "oracle correspondence": _contrastive("correspondence_estimator=oracle"),
    "active complementary loss": _contrastive(
        "loss=acl",
        "negatives_source=batch",
        "temperature=0.3",
        "soft_targets=none",
        "correspondence_estimator=scc",
        "matching_reference_size=4",
        "full_trust_quantile=0.9",
    ),
    "no whitening": _votes("whitening_powers=[0.0]"),
    "no second voting round": _votes("second_round_neighbors=[0]"),
    "20 neighbors": _votes("num_neighbors=[20]"),
    "single round": _rounds(
        *(f"~phases.{phase}" for phase in ("learn_1", "correct_2", "learn_2", "correct_3")), "phases.learn_3.epochs=36"
    ),
    "posterior targets in all rounds": _rounds("phases.learn_1.targets=posterior", "phases.learn_2.targets=posterior"),
    "mixup in the last phase": _rounds("phases.learn_3.mixup=1.0"),
    "CE in the last phase": _rounds("phases.learn_3.loss=ce"),
}
"""The recipe with one component removed or replaced."""

PRETRAINING = "contrastive pretraining"
"""Name of the job that trains the shared contrastive phase."""
MAX_MISMATCH_RATE = 0.4
"""The largest rate of mismatched pairs in the grid."""


@dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Attributes:
        dataset: name of the dataset.
        label_noise: type and rate, such as "symmetric:0.4"; empty for clean labels.
        mismatch_rate: fraction of the training clips whose audio is swapped.
    """

    dataset: str
    label_noise: str
    mismatch_rate: float

    @property
    def name(self) -> str:
        """Name of the cell, from which file names are derived."""
        return f"{self.dataset}, {self.label_noise or 'clean labels'}, pairs {self.mismatch_rate:g}"


Experiment = list[tuple[Cell, tuple[str, ...]]]
"""Cells with the methods that are trained there."""


def file_name(text: str) -> str:
    """Return a text as a file name: lower case, with `-` and `_` as separators."""
    return re.sub(r"[ :+]+", "-", text.replace(", ", "_")).lower()


def grid() -> Experiment:
    """Return every cell of the grid with the methods that are compared there."""
    rates = ("symmetric:0.2", "symmetric:0.4", "symmetric:0.6")
    cells: Experiment = [(Cell("easy", "symmetric:0.8", 0.4), tuple(METHODS))]
    cells += [(Cell("easy", "symmetric:0.8", 0.0), ("distav", *BASELINES))]
    cells += [(Cell("easy", "asymmetric:0.4", 0.4), ("distav", *BASELINES))]
    cells += [(Cell("easy", "", 0.0), ("distav", "CE", TRUE_LABELS))]
    cells += [
        (Cell("hard", label_noise, mismatch_rate), ("distav", *BASELINES))
        for mismatch_rate in (0.4, 0.0)
        for label_noise in ("symmetric:0.2", "symmetric:0.8", "symmetric:0.4", "symmetric:0.6")
    ]
    cells += [
        (Cell("easy", label_noise, mismatch_rate), ("distav",))
        for label_noise in rates
        for mismatch_rate in (0.0, 0.2, 0.4)
    ]
    cells += [(Cell("held-out speaker", "symmetric:0.6", 0.4), ("distav", *BASELINES))]
    return cells


def ablations() -> Experiment:
    """Return the cells of the ablations, each with the full recipe."""
    return [(Cell(name, "symmetric:0.8", MAX_MISMATCH_RATE), ("distav", *ABLATIONS)) for name in ("hard", "easy")]


def pairs() -> Experiment:
    """Return the cells with audio from clips of other classes and no labels, with the methods for mismatched pairs.

    Without mismatched pairs, the given pairs are the true ones, and the method `TRUE_PAIRS` is omitted.
    """
    without_truth = tuple(method for method in PAIR_METHODS if method != TRUE_PAIRS)
    return [
        (Cell("cross-class audio", "", rate), tuple(PAIR_METHODS) if rate else without_truth)
        for rate in (0.0, 0.2, 0.4, 0.6, 0.8)
    ]


NATURAL_METHODS = ("distav", "CE", "GCE", "ELR", "SOP", "mixup")
NATURAL_LABEL_NOISE, NATURAL_MISMATCH_RATES = ("symmetric:0.6", "symmetric:0.4", "symmetric:0.2", ""), (0.4, 0.0)


def natural(datasets: Iterable[str]) -> Experiment:
    """Return every cell of natural datasets, with the same methods in each."""
    return [
        (Cell(dataset, label_noise, mismatch_rate), NATURAL_METHODS)
        for mismatch_rate in NATURAL_MISMATCH_RATES
        for label_noise in NATURAL_LABEL_NOISE
        for dataset in datasets
    ]


EXPERIMENTS = {"grid": grid, "ablations": ablations, "pairs": pairs}


@dataclass(frozen=True)
class Job:
    """One training: a method in a cell with a seed, or the contrastive phase that several methods share."""

    cell: Cell
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run directory and of its result."""
        return file_name(f"{self.cell.name}, {self.method}, seed {self.seed}")

    @property
    def pretraining(self) -> "Job | None":
        """The job whose checkpoint it starts from; None if it trains all phases itself."""
        if self.method == PRETRAINING or not self.settings.shares_pretraining:
            return None
        return Job(Cell(self.cell.dataset, "", self.cell.mismatch_rate), PRETRAINING, self.seed)

    @property
    def settings(self) -> Method:
        """Configuration of its method."""
        return (METHODS | ABLATIONS | PAIR_METHODS)[self.method]
