"""Supervised training on given labels, corrected ones or both: NTL's phase 2, and the baselines it is measured by."""

import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.phases import NEED_CORRECTION, ClassLoss, SupervisedPhase, Targets
from distav.data.pipeline.loader import Batch
from distav.losses.category_contrast import category_agreement, weighted_shares
from distav.losses.classification import (
    early_learning_regularization,
    generalized_cross_entropy,
    hybrid_targets,
    soft_cross_entropy,
)
from distav.losses.instance_discrimination import instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.global_batch import GlobalBatch
from distav.noise.correspondence import sample_weights
from distav.training.loop import Losses, train
from distav.training.run import Run

HEADS = ("logits", "visual_logits", "audio_logits")
_WEIGHT_MIN = 0.25


def run_supervised(run: Run, name: str, settings: SupervisedPhase) -> None:
    """Train the classifiers, and the towers at a rate of their own.

    With corrected labels the sound learns the class that it was itself found to have, and the classifier over both
    counts a sample by how far it is believed to be a pair. Where the correction found its votes to know nothing, the
    given labels are learnt with a loss that bears wrong ones.

    Raises:
        UserError: where true labels are asked for and there are none.
    """
    if settings.targets is Targets.oracle and run.data.labels.true is None:
        raise UserError(f"phases.{name}.targets=oracle: this set has no true labels; choose given or posterior.")
    correction = run.state.correction
    lost = settings.targets in NEED_CORRECTION and not (correction and correction.has_signal)
    loss = ClassLoss.gce if lost else settings.loss
    targets_of = _Targets(run, settings.targets if not lost else Targets.given)
    if targets_of.kind is Targets.given and settings.tower_lr_scale:
        run.state.given_labels_learned = True
    if loss is ClassLoss.elr and "predictions" not in run.bank.columns:
        shape = len(run.bank.rows), len(HEADS), len(run.data.shards.classes)
        run.bank.columns["predictions"] = torch.zeros(shape, device=run.world.device)

    def losses_of(batch: Batch, progress: float) -> Losses:
        del progress
        outputs = run.engine(batch)
        bank, pair = run.bank, (outputs["visual"], outputs["audio"])
        visitors = GlobalBatch.gather(batch.ids, batch.valid, *pair)
        targets, paired = targets_of(batch, visitors.ids)
        present = batch.valid.float()
        weights = (present * paired, present, present)
        logits = [outputs[head] for head in HEADS]
        each = [_class_loss(loss, settings, *both) for both in zip(logits, targets, strict=True)]
        if loss is ClassLoss.elr:
            held = _remember(run, settings, visitors, logits)
            each = [
                one + settings.elr_weight * early_learning_regularization(head, held[:, number])
                for number, (one, head) in enumerate(zip(each, logits, strict=True))
            ]
        both, visual, audio = (weighted_mean(one, weight) for one, weight in zip(each, weights, strict=True))
        losses = {"loss": both + visual + audio, "both": both, "visual": visual, "audio": audio}
        if settings.instance_weight:
            apart = instance_losses(bank, visitors, *pair, settings.temperature)
            losses["instance"] = weighted_mean(apart.losses, present * sample_weights(paired, _WEIGHT_MIN))
            losses["loss"] = losses["loss"] + settings.instance_weight * losses["instance"]
            categories = outputs["visual_categories"], outputs["audio_categories"]
            bank.update(visitors, category_agreement(weighted_shares(*categories, present)))
        return losses

    rate = run.settings.optim.lr * settings.lr_scale
    train(run, name, settings.epochs, (rate * settings.tower_lr_scale, rate), losses_of)


class _Targets:
    """What the three classifiers learn of a sample, and how far its pair is believed."""

    def __init__(self, run: Run, kind: Targets):
        self.bank, self.kind = run.bank, kind
        labels = run.data.labels
        known = labels.true if kind is Targets.oracle and labels.true is not None else labels.given
        self.known = torch.from_numpy(known).to(run.world.device)
        self.classes = torch.arange(len(run.data.shards.classes), device=run.world.device)
        wrong = labels.mismatched() if kind is Targets.oracle else None
        self.pairs = None if wrong is None else torch.from_numpy(~wrong).float().to(run.world.device)
        self.heard = self.known
        if wrong is not None and labels.pair_id is not None:
            self.heard = self.known[torch.from_numpy(labels.pair_id).to(run.world.device)]

    def __call__(self, batch: Batch, ids: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return targets [b, C] of the classifiers over both, picture and sound, and the pair's weight [b].

        Args:
            batch: this rank's.
            ids: [B] of all ranks.
        """
        if self.kind in (Targets.given, Targets.oracle):
            seen, heard = ((each[batch.ids, None] == self.classes).float() for each in (self.known, self.heard))
            paired = torch.ones_like(seen[:, 0]) if self.pairs is None else self.pairs[batch.ids]
            return (seen, seen, heard), paired
        name = "held_out" if self.kind is Targets.held_out else "posterior"
        seen, heard, paired = self.bank.fetch((name, f"audio_{name}", "correspondence"), ids)
        if self.kind is Targets.hybrid:
            votes = self.bank.fetch(("held_out",), ids)[0]
            seen = hybrid_targets(self.known[batch.ids], votes, votes.amax(1))
        return (seen, seen, heard), paired


def _class_loss(loss: ClassLoss, settings: SupervisedPhase, logits: Tensor, targets: Tensor) -> Tensor:
    if loss is ClassLoss.gce:
        return generalized_cross_entropy(logits, targets, settings.gce_q)
    return soft_cross_entropy(logits, targets)


def _remember(run: Run, settings: SupervisedPhase, visitors: GlobalBatch, logits: list[Tensor]) -> Tensor:
    """Mix this step's predictions into those remembered, and return them: [b, heads, C]."""
    now = torch.stack([head.detach().softmax(1).clamp(1e-4, 1 - 1e-4) for head in logits], dim=1)
    now = now / now.sum(2, keepdim=True)
    held = run.bank.fetch(("predictions",), visitors.ids)[0]
    held = torch.lerp(now, held, settings.elr_momentum)
    run.bank.write("predictions", held, visitors.ids, visitors.valid)
    return held
