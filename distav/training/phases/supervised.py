"""Supervised phase: trains classifiers on given or corrected labels (phase 2 of NTL, and the baselines)."""

import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.phases import NEED_CORRECTION, SupervisedPhase, Targets
from distav.data.pipeline.class_balance import ClassBalance
from distav.data.pipeline.loader import Batch
from distav.losses.category_contrast import category_agreement, weighted_category_probs
from distav.losses.classification import CLASSIFICATION_LOSSES
from distav.losses.instance_discrimination import instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory.global_batch import GlobalBatch
from distav.noise.correspondence import sample_weights
from distav.training.classifier_fusion import held_out_clips
from distav.training.loop import Losses, train
from distav.training.phases.classifier_targets import ClassifierTargets
from distav.training.phases.mixup import Mixup
from distav.training.phases.multi_label_targets import has_true_labels, make_targets
from distav.training.run import Run

HEADS = ("logits", "visual_logits", "audio_logits")
"""Outputs of the network with the logits of the classifiers."""
MIN_PAIR_WEIGHT = 0.25
"""Weight of a mismatched pair in the instance loss (RAVID: 0.25)."""


def run_supervised(run: Run, name: str, config: SupervisedPhase) -> None:
    """Train the classifiers, and the towers at their own learning rate.

    With corrected labels, the visual and the audio classifier learn the class that the correction assigned to their
    modality, and the joint classifier the class of a matched pair, weighted by the correspondence probability.
    Classifiers leave out samples that lack a modality they need. If the targets are corrected labels and the correction
    had no label signal, the phase trains on the given labels, with generalized cross-entropy if clips have one label.

    Clips that are held out for the fusion of the classifiers have no weight in the losses of the classifiers, see
    `distav.training.classifier_fusion`.

    For long-tailed classes, `class_balance` changes how often clips are drawn (Kang et al. 2020), and
    `logit_adjustment` adds the logarithm of the class prior to the logits in the loss (Menon et al. 2021, equation 10).
    Both follow the targets that the phase trains on.

    With `mixup`, the classifiers are trained on mixtures of clips, see `distav.training.phases.mixup`.

    Clips of a multi-label dataset have a target for each class; the loss treats the classes as independent, and
    `logit_adjustment` adds the logit of the class frequency.

    Raises:
        UserError: if the targets are true labels and the dataset has none.
    """
    if config.targets is Targets.oracle and not has_true_labels(run):
        raise UserError(
            f"phases.{name}.targets=oracle: the dataset has no true labels. Set phases.{name}.targets=given or "
            "posterior."
        )
    correction = run.state.correction
    fall_back = config.targets in NEED_CORRECTION and not (correction and correction.has_signal)
    classifier_targets = make_targets(run, Targets.given if fall_back else config.targets)
    if classifier_targets.kind is Targets.given and config.tower_lr_scale:
        run.state.given_labels_learned = True
    robust = fall_back and not run.data.shards.multi_label
    loss_type = CLASSIFICATION_LOSSES.select("gce" if robust else config.loss, f"phases.{name}.loss")
    classification_loss = loss_type(config, run.bank, len(HEADS), len(run.data.shards.classes))
    balance = _class_balance(run, name, config, classifier_targets)
    held_out = held_out_clips(run)
    mixup = Mixup(config.mixup, run.world.device) if config.mixup else None
    trained = None if held_out is None else torch.from_numpy(~held_out).float().to(run.world.device)
    offsets = config.logit_adjustment * classifier_targets.log_priors(balance) if config.logit_adjustment else None

    def losses_of(batch: Batch, _progress: float) -> Losses:
        mixture = mixup.draw(batch, None if trained is None else trained[batch.ids] > 0) if mixup else None
        outputs = run.engine(mixture.batch(batch) if mixture else batch)
        global_batch = GlobalBatch.gather(batch.ids, batch.valid, outputs["visual"], outputs["audio"], batch.present)
        targets, pair_weights = classifier_targets.of_batch(batch.ids, global_batch.ids)
        paired = batch.paired.float()
        weights = (paired * pair_weights, batch.present["visual"].float(), batch.present["audio"].float())
        if trained is not None:
            weights = tuple(weight * trained[batch.ids] for weight in weights)
        if mixture:
            targets = tuple(map(mixture.targets, targets))
            weights = tuple(map(mixture.weights, weights))
        logits = [outputs[head] for head in HEADS]
        if offsets is not None:
            logits = [head + offset for head, offset in zip(logits, offsets, strict=True)]
        per_head = classification_loss(global_batch, logits, targets)
        both, visual, audio = [
            weighted_mean(head_losses, weight) for head_losses, weight in zip(per_head, weights, strict=True)
        ]
        losses = {"loss": both + visual + audio, "both": both, "visual": visual, "audio": audio}
        if config.instance_weight:
            losses["instance"] = _instance_loss(run, config, outputs, global_batch, paired, pair_weights)
            losses["loss"] = losses["loss"] + config.instance_weight * losses["instance"]
        return losses

    rate = run.config.optim.lr * config.lr_scale
    train(run, name, config.epochs, (rate * config.tower_lr_scale, rate), losses_of, balance=balance)
    classification_loss.end_phase()


def _class_balance(
    run: Run, name: str, config: SupervisedPhase, classifier_targets: ClassifierTargets
) -> ClassBalance | None:
    """Return the class-balanced sampling of a phase and log it; None if every sample is drawn once per epoch."""
    if not config.class_balance:
        return None
    balance = classifier_targets.balance(config.class_balance)
    run.logger.info(
        f"phase={name} class_balance={config.class_balance:g}: a clip of the largest class is drawn "
        f"{balance.rates.min():.2g} times per epoch, one of the smallest class {balance.rates.max():.2g} times"
    )
    return balance


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
