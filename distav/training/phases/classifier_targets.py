"""Targets of the classifiers in a supervised phase, and the class frequencies of these targets.

Legend: b samples of a rank's batch, B of all ranks, N training samples, n owned by this rank, H classifiers, C classes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distav.config.phases import Targets
from distav.data.pipeline.class_balance import ClassBalance
from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_
from distav.losses.classification import hybrid_targets
from distav.noise.probabilities import SMALLEST
from distav.training.run import Run

_BLOCK_ROWS = 2**16
"""Samples whose targets are computed at a time."""


class ClassifierTargets:
    """Targets of the three classifiers, and weights of the pairs."""

    def __init__(self, run: Run, kind: Targets):
        self.run, self.bank, self.kind = run, run.bank, kind
        labels, device = run.data.labels, run.world.device
        oracle = kind is Targets.oracle
        known = labels.true if oracle and labels.true is not None else labels.given
        self.visual_labels = torch.from_numpy(known).to(device)
        self.audio_labels = self.visual_labels
        self.classes = torch.arange(len(run.data.shards.classes), device=device)
        mismatched = labels.mismatched() if oracle else None
        self.matched = None if mismatched is None else torch.from_numpy(~mismatched).float().to(device)
        if mismatched is not None and labels.pair_id is not None:
            self.audio_labels = self.visual_labels[torch.from_numpy(labels.pair_id).to(device)]

    def of_batch(self, batch_ids: Tensor, ids: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return targets [b, C] of the audio-visual, visual and audio classifiers, and pair weights [b].

        Args:
            batch_ids: [b] ids of the batch of this rank.
            ids: [B] ids of the batch of all ranks.
        """
        return self._of_samples(batch_ids, lambda *names: self.bank.fetch(names, ids))

    def balance(self, strength: float) -> ClassBalance:
        """Return the class-balanced sampling by the most probable class of each sample's targets."""
        classes = [targets[0].argmax(1) for _, targets, _ in self._owned_blocks()]
        all_classes = all_gather_variable_rows(torch.cat(classes) if classes else self.classes[:0])
        return ClassBalance(all_classes.cpu().numpy(), strength)

    def log_priors(self, balance: ClassBalance | None) -> Tensor:
        """Return the logarithms of the class frequencies that each classifier is trained on: [H, C] float32.

        The frequency of a class is the sum of its target probabilities over all samples, weighted as in the loss of the
        classifier: by the expected number of draws, the modalities of the sample, and its pair weight. Frequencies of
        less than one sample count as one.

        Args:
            balance: sampling of the phase; None: every sample once.
        """
        device, split = self.classes.device, self.run.data.train
        has = [torch.from_numpy(split.has_modality(name)).to(device) for name in ("visual", "audio")]
        rates = None if balance is None else torch.from_numpy(balance.rates).to(device)
        totals = torch.zeros(3, len(self.classes), dtype=torch.float64, device=device)
        for ids, targets, pair_weights in self._owned_blocks():
            visual, audio = (present[ids].double() for present in has)
            draws = torch.ones_like(visual) if rates is None else rates[ids]
            weights = draws * torch.stack([visual * audio * pair_weights, visual, audio])
            totals += torch.stack([weight @ target.double() for weight, target in zip(weights, targets, strict=True)])
        frequencies = all_reduce_sum_(totals).clamp_min(1.0)
        return (frequencies / frequencies.sum(1, keepdim=True)).log().float()

    def _owned_blocks(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]]:
        """Yield ids, targets and pair weights of the samples that this rank owns, in blocks."""
        rows = self.bank.rows
        for start in range(rows.start, rows.stop, _BLOCK_ROWS):
            ids = torch.arange(start, min(start + _BLOCK_ROWS, rows.stop), device=self.classes.device)
            owned = ids - rows.start

            def columns(*names: str, owned: Tensor = owned) -> list[Tensor]:
                return [self.bank.columns[name][owned].float() for name in names]

            yield ids, *self._of_samples(ids, columns)

    def _of_samples(
        self, ids: Tensor, columns: Callable[..., list[Tensor]]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return targets and pair weights of samples; `columns` returns their rows of the named bank columns."""
        if self.kind in (Targets.given, Targets.oracle):
            visual = (self.visual_labels[ids, None] == self.classes).float()
            audio = (self.audio_labels[ids, None] == self.classes).float()
            pair_weights = torch.ones_like(visual[:, 0]) if self.matched is None else self.matched[ids]
            return (visual, visual, audio), pair_weights
        column = "held_out" if self.kind is Targets.held_out else "posterior"
        visual, audio, pair_weights = columns(f"visual_{column}", f"audio_{column}", "correspondence")
        if self.kind is Targets.hybrid:
            votes = columns("held_out")[0]
            joint = visual = hybrid_targets(self.visual_labels[ids], votes, votes.amax(1))
        else:
            joint = _matched_class(visual, audio)
        return (joint, visual, audio), pair_weights


def _matched_class(visual: Tensor, audio: Tensor) -> Tensor:
    """Return the normalized geometric mean of the class probabilities of both modalities: [b, C] -> [b, C].

    The joint classifier weights a pair by the probability that both have the same class, and learns that class. The
    class of the label's owner would teach it to trust the owner in mismatched pairs that are taken for matched ones.
    """
    means = (visual * audio).clamp_min(SMALLEST).sqrt()
    return means / means.sum(1, keepdim=True)
