"""Targets of the classifiers in a supervised phase on a multi-label dataset.

Legend: b samples of a rank's batch, B of all ranks, N training samples, n owned by this rank, H classifiers, C classes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import Targets
from distav.data.pipeline.class_balance import ClassBalance
from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_
from distav.training.phases.classifier_targets import ClassifierTargets
from distav.training.run import Run


class MultiLabelTargets(ClassifierTargets):
    """Target probabilities of each class, the same for the three classifiers; mismatched pairs are not estimated."""

    def __init__(self, run: Run, kind: Targets):
        self.run, self.bank, self.kind = run, run.bank, kind
        labels, device = run.data.multi_labels, run.world.device
        known = labels.true if kind is Targets.oracle and labels.true is not None else labels.given
        self.labels = torch.from_numpy(known).to(device)
        self.classes = torch.arange(len(labels.classes), device=device)

    def balance(self, strength: float) -> ClassBalance:
        """Return the class-balanced sampling in which each clip counts for the rarest of its classes.

        A class belongs to a clip if its target is 0.5 or more; clips without classes form a class of their own.
        """
        owned = [targets[0] >= 0.5 for _, targets, _ in self._owned_blocks()]
        rows = torch.cat(owned) if owned else torch.zeros(0, len(self.classes), dtype=torch.bool)
        present = all_gather_variable_rows(rows.to(torch.uint8)).cpu().numpy() > 0
        counts = np.where(present, present.sum(0), np.iinfo(np.int64).max)
        rarest = np.where(present.any(1), counts.argmin(1), len(self.classes))
        return ClassBalance(rarest.astype(np.int64), strength)

    def log_priors(self, balance: ClassBalance | None) -> Tensor:
        """Return the logits log(f / (1 - f)) of the class frequencies that each classifier is trained on: [H, C].

        The frequency f of a class is the mean of its target probability over all samples, weighted by the expected
        number of draws and the modalities of the sample. It is at least that of one sample, and at most that of all
        but one.

        Args:
            balance: sampling of the phase; None: every sample once.
        """
        device, split = self.classes.device, self.run.data.train
        has = [torch.from_numpy(split.has_modality(name)).to(device) for name in ("visual", "audio")]
        rates = None if balance is None else torch.from_numpy(balance.rates).to(device)
        totals = torch.zeros(3, len(self.classes) + 1, dtype=torch.float64, device=device)
        for ids, targets, _ in self._owned_blocks():
            visual, audio = (present[ids].double() for present in has)
            draws = torch.ones_like(visual) if rates is None else rates[ids]
            weights = draws * torch.stack([visual * audio, visual, audio])
            totals[:, :-1] += weights @ targets[0].double()
            totals[:, -1] += weights.sum(1)
        all_reduce_sum_(totals)
        samples = totals[:, -1:].clamp_min(2.0)
        present = totals[:, :-1].clamp_min(1.0).minimum(samples - 1)
        return (present.log() - (samples - present).log()).float()

    def _of_samples(
        self, ids: Tensor, columns: Callable[..., list[Tensor]]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return targets and pair weights of samples; `columns` returns their rows of the named bank columns."""
        if self.kind in (Targets.given, Targets.oracle):
            targets = self.labels[ids].float()
        else:
            (targets,) = columns("held_out" if self.kind is Targets.held_out else "posterior")
        return (targets, targets, targets), torch.ones_like(targets[:, 0])


def make_targets(run: Run, kind: Targets) -> ClassifierTargets:
    """Return the targets of a phase for the labels of the dataset."""
    return MultiLabelTargets(run, kind) if run.data.shards.multi_label else ClassifierTargets(run, kind)


def has_true_labels(run: Run) -> bool:
    """Return whether the dataset stores the true labels of the training clips."""
    data = run.data
    return (data.multi_labels.true if data.shards.multi_label else data.labels.true) is not None
