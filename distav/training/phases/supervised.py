"""Supervised phase: trains classifiers on given or corrected labels (phase 2 of NTL, and the baselines)."""

import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.phases import NEED_CORRECTION, SupervisedPhase, Targets
from distav.data.pipeline.loader import Batch
from distav.losses.category_contrast import category_agreement, weighted_category_probs
from distav.losses.classification import CLASSIFICATION_LOSSES, hybrid_targets
from distav.losses.instance_discrimination import instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.global_batch import GlobalBatch
from distav.noise.correspondence import sample_weights
from distav.training.loop import Losses, train
from distav.training.run import Run

HEADS = ("logits", "visual_logits", "audio_logits")
"""Outputs of the network with the logits of the classifiers."""
MIN_PAIR_WEIGHT = 0.25
"""Weight of a mismatched pair in the instance loss (RAVID: 0.25)."""


def run_supervised(run: Run, name: str, config: SupervisedPhase) -> None:
    """Train the classifiers, and the towers at their own learning rate.

    With corrected labels, the audio classifier learns the class that the correction assigned to the audio, and the
    audio-visual classifier weights each sample by its correspondence probability. Classifiers leave out samples that
    lack a modality they need. If the targets are corrected labels
    and the correction had no label signal, the phase trains on the given labels with generalized cross-entropy.

    Raises:
        UserError: if the targets are true labels and the dataset has none.
    """
    if config.targets is Targets.oracle and run.data.labels.true is None:
        raise UserError(
            f"phases.{name}.targets=oracle: the dataset has no true labels. Set phases.{name}.targets=given or "
            "posterior."
        )
    correction = run.state.correction
    fall_back = config.targets in NEED_CORRECTION and not (correction and correction.has_signal)
    targets_of = _Targets(run, Targets.given if fall_back else config.targets)
    if targets_of.kind is Targets.given and config.tower_lr_scale:
        run.state.given_labels_learned = True
    loss_type = CLASSIFICATION_LOSSES.select("gce" if fall_back else config.loss, f"phases.{name}.loss")
    classification_loss = loss_type(config, run.bank, len(HEADS), len(run.data.shards.classes))

    def losses_of(batch: Batch, _progress: float) -> Losses:
        outputs = run.engine(batch)
        global_batch = GlobalBatch.gather(batch.ids, batch.valid, outputs["visual"], outputs["audio"], batch.present)
        targets, pair_weights = targets_of(batch, global_batch.ids)
        paired = batch.paired.float()
        weights = (paired * pair_weights, batch.present["visual"].float(), batch.present["audio"].float())
        per_head = classification_loss(global_batch, [outputs[head] for head in HEADS], targets)
        both, visual, audio = [
            weighted_mean(head_losses, weight) for head_losses, weight in zip(per_head, weights, strict=True)
        ]
        losses = {"loss": both + visual + audio, "both": both, "visual": visual, "audio": audio}
        if config.instance_weight:
            losses["instance"] = _instance_loss(run, config, outputs, global_batch, paired, pair_weights)
            losses["loss"] = losses["loss"] + config.instance_weight * losses["instance"]
        return losses

    rate = run.config.optim.lr * config.lr_scale
    train(run, name, config.epochs, (rate * config.tower_lr_scale, rate), losses_of)


def _instance_loss(
    run: Run,
    config: SupervisedPhase,
    outputs: dict[str, Tensor],
    global_batch: GlobalBatch,
    paired: Tensor,
    pair_weights: Tensor,
) -> Tensor:
    """Return the instance loss against the memory bank, which regularizes the training, and update the bank."""
    result = instance_losses(run.bank, global_batch, outputs["visual"], outputs["audio"], config.temperature)
    loss = weighted_mean(result.losses, paired * sample_weights(pair_weights, MIN_PAIR_WEIGHT))
    probs = weighted_category_probs(outputs["visual_categories"], outputs["audio_categories"], paired)
    run.bank.update(global_batch, category_agreement(probs))
    return loss


class _Targets:
    """Targets of the three classifiers, and weights of the pairs."""

    def __init__(self, run: Run, kind: Targets):
        self.bank, self.kind = run.bank, kind
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

    def __call__(self, batch: Batch, ids: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return targets [b, C] of the audio-visual, visual and audio classifiers, and pair weights [b].

        Args:
            batch: batch of this rank.
            ids: [B] ids of the batch of all ranks.
        """
        if self.kind in (Targets.given, Targets.oracle):
            visual = (self.visual_labels[batch.ids, None] == self.classes).float()
            audio = (self.audio_labels[batch.ids, None] == self.classes).float()
            pair_weights = torch.ones_like(visual[:, 0]) if self.matched is None else self.matched[batch.ids]
            return (visual, visual, audio), pair_weights
        column = "held_out" if self.kind is Targets.held_out else "posterior"
        visual, audio, pair_weights = self.bank.fetch((column, f"audio_{column}", "correspondence"), ids)
        if self.kind is Targets.hybrid:
            votes = self.bank.fetch(("held_out",), ids)[0]
            visual = hybrid_targets(self.visual_labels[batch.ids], votes, votes.amax(1))
        return (visual, visual, audio), pair_weights
