"""Phase 1: noise-tolerant contrastive training, which looks at no label (NTL section "noise-tolerant contrastive")."""

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


def run_contrastive(run: Run, name: str, settings: ContrastivePhase) -> None:
    """Train towers, projections and categories against the bank; estimate which pairs correspond."""
    losses_of = contrastive_losses(run, settings)
    watch = _CategoryWatch(run, name, settings)

    def watched(batch: Batch, progress: float) -> Losses:
        losses = losses_of(batch, progress)
        watch.see(losses)
        return losses

    def begin_epoch(epoch: int, progress: float) -> None:
        del epoch
        watch.judge(progress)
        estimate_correspondence(run, settings, trusted=progress >= settings.pair_weighting_start)

    rate = run.settings.optim.lr * settings.lr_scale
    train(run, name, settings.epochs, (rate, rate), watched, begin_epoch, restart=settings.reinitialize)
    watch.judge(1.0)
    summarize_correspondence(run, name, settings)


class _CategoryWatch:
    """Tells once an epoch how many categories are used, and warns where they have collapsed."""

    def __init__(self, run: Run, name: str, settings: ContrastivePhase):
        self.run, self.name, self.settings = run, name, settings
        self.seen: list[Tensor] = []
        self.warned = False

    def see(self, losses: Losses) -> None:
        """Note a step's parts of the loss, which are the same on all ranks."""
        self.seen.append(torch.stack([losses["category"].detach(), losses["imbalance"].detach()]))

    def judge(self, progress: float) -> None:
        """Look back on the steps since the last time; nothing is expected before the loss has faded in."""
        if self.seen and self.settings.category_weight:
            contrast, imbalance = torch.stack(self.seen).mean(0).tolist()
            num_categories = self.run.settings.model.num_categories or len(self.run.data.shards.classes)
            used = effective_num_categories(imbalance, num_categories)
            self.run.logger.log_metrics(self.run.progress.total_steps, {"categories/effective_number": used})
            fault = detect_category_collapse(contrast, imbalance, num_categories)
            if (
                fault
                and not self.warned
                and self.run.world.is_main
                and progress > 2 * self.settings.category_warmup_fraction
            ):
                self.warned = True
                self.run.logger.warn(
                    f"phase={self.name} {fault}, so the category-level loss teaches little; raise "
                    f"phases.{self.name}.category_balance_weight or category_entropy_weight, or set category_weight=0"
                )
        self.seen.clear()


def contrastive_losses(run: Run, settings: ContrastivePhase) -> Callable[[Batch, float], Losses]:
    """Return the function that computes the losses of a batch at some progress of the phase and updates the bank."""
    instance_term = InstanceTerm(run, settings)

    def losses_of(batch: Batch, progress: float) -> Losses:
        outputs = run.engine(batch)
        bank = run.bank
        visitors = GlobalBatch.gather(batch.ids, batch.valid, outputs["visual"], outputs["audio"])
        each, weights, pair_weights = instance_term(outputs, batch, visitors, progress)
        instance = weighted_mean(each, weights)
        logits = outputs["visual_categories"], outputs["audio_categories"]
        memory = bank.assignments.columns() if settings.category_memory_weight else None
        category = category_loss(
            *logits, pair_weights, settings.category_temperature, memory, settings.category_memory_weight
        )
        bank.update(visitors, category_agreement(category.shares), category.shares if memory else None)
        fade = ramp(progress, 0.0, settings.category_warmup_fraction)
        loss = instance + fade * _weighed(category, settings)
        return {
            "loss": loss,
            "instance": instance,
            "category": category.contrast,
            "imbalance": category.imbalance,
            "row_entropy": category.row_entropy,
        }

    return losses_of


def _weighed(category: CategoryLoss, settings: ContrastivePhase) -> Tensor:
    return (
        settings.category_weight * category.contrast
        + settings.category_balance_weight * category.imbalance
        + settings.category_entropy_weight * category.row_entropy
    )
