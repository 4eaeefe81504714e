"""Given and corrected labels of some clips as texts, for figures.

Legend: n clips, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import EventParsingPhase
from distav.distributed.collectives import all_gather_rows
from distav.noise.class_posterior import corrected_labels, probability_of
from distav.noise.multi_label_correction import PRESENT
from distav.training.run import Run


@dataclass(frozen=True)
class ClipLabels:
    """Labels of n clips.

    Attributes:
        given: class names.
        corrected: class names, and `confidence`: probability of the label; of a label list, that of its least certain
            class. None before the first correction, and after one without a label signal.
    """

    given: list[str]
    corrected: list[str] | None = None
    confidence: list[float] | None = None

    def lines(self, index: int) -> list[str]:
        """Return the caption of a clip."""
        lines = [f"given: {self.given[index]}"]
        if self.corrected is not None and self.confidence is not None:
            lines.append(f"corrected: {self.corrected[index]}, confidence {self.confidence[index]:.2f}")
        return lines


def read_clip_labels(run: Run, ids: Tensor) -> ClipLabels:
    """Return the labels of training clips; called by all ranks, each with the same number of ids.

    Args:
        run: the run.
        ids: [n] int64 on the device of the run.
    """
    rows, classes = ids.cpu().numpy(), run.data.shards.classes
    if run.data.shards.multi_label or _only_parses(run):
        has = run.data.multi_labels.given if run.data.shards.multi_label else run.data.events.weak
        given = [_list_names(row, classes) for row in has[rows]]
    else:
        given = [classes[label] for label in run.data.labels.given[rows]]
    correction = run.state.correction
    if correction is None or not correction.has_signal or not run.state.report.corrections:
        return ClipLabels(given)
    posterior = run.bank.fetch(("posterior",), all_gather_rows(ids))[0].float()
    if run.data.shards.multi_label:
        has = (posterior > PRESENT).cpu().numpy()
        confidence = torch.maximum(posterior, 1 - posterior).amin(1)
        return ClipLabels(given, [_list_names(row, classes) for row in has], confidence.tolist())
    labels = torch.from_numpy(run.data.labels.given[rows]).to(posterior.device)
    corrected = corrected_labels(posterior, labels, run.state.report.corrections[-1]["change_odds"])
    names = [classes[label] for label in corrected.tolist()]
    return ClipLabels(given, names, probability_of(corrected, posterior).tolist())


def _only_parses(run: Run) -> bool:
    return all(isinstance(phase, EventParsingPhase) for phase in run.config.phases.values())


def _list_names(has: np.ndarray, classes: list[str]) -> str:
    return " | ".join(classes[index] for index in np.flatnonzero(has)) or "(none)"
