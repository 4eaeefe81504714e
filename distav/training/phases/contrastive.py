"""Contrastive phase: noise-tolerant contrastive training without labels (NTL, section "noise-tolerant contrastive")."""

from collections.abc import Callable

import torch
from torch import Tensor

from distav.config.phases import ContrastivePhase
from distav.data.pipeline.loader import Batch
from distav.losses.category_contrast import (
    CategoryLoss,
    category_agreement,
    category_loss,
    detect_category_collapse,
    effective_num_categories,
)
from distav.losses.reduction import weighted_mean
from distav.memory.global_batch import GlobalBatch
from distav.training.loop import Losses, train
from distav.training.phases.correspondence import estimate_correspondence, summarize_correspondence
from distav.training.phases.instance_loss import InstanceTerm, ramp
from distav.training.run import Run


def run_contrastive(run: Run, name: str, config: ContrastivePhase) -> None:
    """Train towers, projections and category heads, and estimate which pairs correspond.

    Samples with one modality take part in the within-modal loss alone.
    """
    losses_of = contrastive_losses(run, config)
    monitor = _CategoryMonitor(run, name, config)

    def monitored_losses(batch: Batch, progress: float) -> Losses:
        losses = losses_of(batch, progress)
        monitor.add(losses)
        return losses

    def begin_epoch(_epoch: int, progress: float) -> None:
        monitor.log(progress)
        estimate_correspondence(run, config, store=progress >= config.pair_weighting_start)

    rate = run.config.optim.lr * config.lr_scale
    train(run, name, config.epochs, (rate, rate), monitored_losses, begin_epoch, reinitialize=config.reinitialize)
    monitor.log(1.0)
    summarize_correspondence(run, name, config)


class _CategoryMonitor:
    """Logs the effective number of categories once per epoch, and warns once if the categories have collapsed."""

    def __init__(self, run: Run, name: str, config: ContrastivePhase):
        self.run, self.name, self.config = run, name, config
        self.terms: list[Tensor] = []
        self.has_warned = False

    def add(self, losses: Losses) -> None:
        """Add the terms of a step's category-level loss, which are equal on all ranks."""
        self.terms.append(torch.stack([losses["category"].detach(), losses["imbalance"].detach()]))

    def log(self, progress: float) -> None:
        """Log the steps since the last call; warnings begin after twice the warm-up of the loss."""
        if self.terms and self.config.category_weight and self.run.bank.has_pairs():
            contrast, imbalance = torch.stack(self.terms).mean(0).tolist()
            num_categories = self.run.config.model.num_categories or len(self.run.data.shards.classes)
            used = effective_num_categories(imbalance, num_categories)
            self.run.logger.log_metrics(self.run.progress.total_steps, {"categories/effective_number": used})
            collapse = detect_category_collapse(contrast, imbalance, num_categories)
            if collapse and progress > 2 * self.config.category_warmup_fraction:
                self._warn(collapse)
        self.terms.clear()

    def _warn(self, collapse: str) -> None:
        if self.has_warned or not self.run.world.is_main:
            return
        self.has_warned = True
        self.run.logger.warn(
            f"phase={self.name} category collapse: {collapse}, so the category-level loss has little effect. The "
            "instance-level loss continues, and label correction does not use categories. This may end later in the "
            f"phase (metric categories/effective_number). If it does not, raise phases.{self.name}."
            "category_balance_weight or category_entropy_weight, or set category_weight=0."
        )


def contrastive_losses(run: Run, config: ContrastivePhase) -> Callable[[Batch, float], Losses]:
    """Return the function that computes the losses of a batch and updates the memory bank."""
    instance_term = InstanceTerm(run, config)

    def losses_of(batch: Batch, progress: float) -> Losses:
        outputs = run.engine(batch)
        bank = run.bank
        global_batch = GlobalBatch.gather(batch.ids, batch.valid, outputs["visual"], outputs["audio"], batch.present)
        losses, weights, pair_weights = instance_term(outputs, batch, global_batch, progress)
        instance = weighted_mean(losses, weights)
        memory = bank.assignments.gram_matrices() if config.category_memory_weight else None
        category = category_loss(
            outputs["visual_categories"],
            outputs["audio_categories"],
            pair_weights,
            config.category_temperature,
            memory,
            config.category_memory_weight,
        )
        agreement = category_agreement(category.weighted_probs)
        bank.update(global_batch, agreement, category.weighted_probs if memory else None)
        warmup = ramp(progress, 0.0, config.category_warmup_fraction)
        return {
            "loss": instance + warmup * _weighted_sum(category, config),
            "instance": instance,
            "category": category.contrast,
            "imbalance": category.imbalance,
            "row_entropy": category.row_entropy,
        }

    return losses_of


def _weighted_sum(category: CategoryLoss, config: ContrastivePhase) -> Tensor:
    return (
        config.category_weight * category.contrast
        + config.category_balance_weight * category.imbalance
        + config.category_entropy_weight * category.row_entropy
    )
