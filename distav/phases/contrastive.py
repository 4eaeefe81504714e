"""Phase 1: noise-tolerant contrastive training, which looks at no label (NTL section "noise-tolerant contrastive")."""

from collections.abc import Callable

import torch
from torch import Tensor

from distav.data.loader import Batch
from distav.evaluate import auroc
from distav.losses.category import (
    CategoryLoss,
    categories_used,
    category_agreement,
    category_fault,
    category_loss,
)
from distav.losses.instance import WITHIN, Negatives, SoftTargets, instance_losses, weighted_mean
from distav.memory.bank import Visitors
from distav.memory.sampled import Partition
from distav.phase_settings import ContrastivePhase, Estimator
from distav.phases.loop import Losses, train
from distav.robust.correspondence import cdf_correspondence, gmm_correspondence, sample_weights
from distav.run import Run


def run_contrastive(run: Run, name: str, settings: ContrastivePhase) -> None:
    """Train towers, projections and categories against the bank; estimate once an epoch which pairs correspond."""
    losses_of = contrastive_losses(run, settings)
    watch = _CategoryWatch(run, name, settings)

    def watched(batch: Batch, progress: float) -> Losses:
        losses = losses_of(batch, progress)
        watch.see(losses)
        return losses

    def begin_epoch(epoch: int, progress: float) -> None:
        del epoch
        watch.judge(progress)
        estimate_correspondence(run, settings, trusted=progress >= settings.trust_after)

    rate = run.settings.optim.lr * settings.lr_scale
    train(run, name, settings.epochs, (rate, rate), watched, begin_epoch)
    watch.judge(1.0)
    estimate_correspondence(run, settings, trusted=True)


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
            used = categories_used(imbalance, num_categories)
            self.run.monitor.record(self.run.position.total_steps, {"categories/used": used})
            fault = category_fault(contrast, imbalance, num_categories)
            if fault and not self.warned and self.run.world.is_main and progress > 2 * self.settings.category_ramp:
                self.warned = True
                self.run.monitor.warn(
                    f"phase={self.name} {fault}, so the category-level loss teaches little; raise "
                    f"phases.{self.name}.balance_weight or sharpen_weight, or set category_weight=0"
                )
        self.seen.clear()


def contrastive_losses(run: Run, settings: ContrastivePhase) -> Callable[[Batch, float], Losses]:
    """Return the function that computes the losses of a batch at some progress of the phase and updates the bank."""
    soft = SoftTargets(
        settings.soft_targets.name,
        settings.soft_temperature,
        settings.cycle_temperature,
        settings.soft_excludes_self,
    )

    partition = Partition(run.notes.get("nce_partition")) if settings.nce else None

    def losses_of(batch: Batch, progress: float) -> Losses:
        outputs = run.engine(batch)
        bank, pair = run.bank, (outputs["visual"], outputs["audio"])
        visitors = Visitors.gather(batch.ids, batch.valid, *pair)
        trust = ramp(progress, settings.trust_after, settings.trust_ramp)
        believed = bank.fetch(("correspondence",), visitors.ids)[0]
        present = batch.valid.float()
        weights = present * (1 + trust * (sample_weights(believed, settings.weight_min) - 1))
        softens = trust > 0 and (settings.soften_all or settings.estimator is not Estimator.none)
        doubt = torch.ones_like(believed) if settings.soften_all else 1 - believed
        each = instance_losses(
            bank,
            visitors,
            *pair,
            outputs.get("temperature", settings.temperature),
            trust * settings.soft_weight * doubt if softens else None,
            soft,
            negatives=Negatives(settings.negatives, run.settings.run.seed, run.position.total_steps, partition)
            if settings.negatives
            else None,
            mask_unvisited=settings.mask_unvisited,
        )
        if settings.within_weight:
            each = each + settings.within_weight * instance_losses(
                bank, visitors, *pair, outputs.get("temperature", settings.temperature), directions=WITHIN
            )
        if partition:
            run.notes["nce_partition"] = partition.value
        instance = weighted_mean(each, weights)
        logits = outputs["visual_categories"], outputs["audio_categories"]
        memory = bank.assignments.columns() if settings.category_memory else None
        category = category_loss(*logits, weights, settings.category_temperature, memory, settings.category_memory)
        bank.update(visitors, category_agreement(category.shares), category.shares if memory else None)
        fade = ramp(progress, 0.0, settings.category_ramp)
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
        + settings.balance_weight * category.imbalance
        + settings.sharpen_weight * category.row_entropy
    )


def ramp(progress: float, start: float, length: float) -> float:
    """Return 0 before `start`, 1 from `start + length` on, linear between; all are shares of a phase."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / length) if length else 1.0


def estimate_correspondence(run: Run, settings: ContrastivePhase, trusted: bool) -> None:
    """Estimate which pairs correspond from the bank, and store it once weights and soft targets are to be trusted.

    Estimates are averaged over epochs; the first one counts whole.
    """
    similarity = run.bank.pair_similarity()
    seen = torch.isfinite(similarity)
    step = run.position.total_steps
    run.monitor.histogram("pairs/similarity", similarity, step)
    if int(seen.sum()) < 10:
        return
    record: dict[str, float | str] = {"pairs/similarity_mean": float(similarity[seen].mean())}
    estimate = torch.ones_like(similarity)
    if settings.estimator is Estimator.gmm:
        estimate[seen], mixture = gmm_correspondence(similarity[seen])
        for side, mean, share in zip(("low", "high"), mixture.means, mixture.shares, strict=True):
            record |= {f"pairs/mean_{side}": mean, f"pairs/share_{side}": share}
    elif settings.estimator is Estimator.cdf:
        estimate[seen] = cdf_correspondence(similarity[seen])
    elif settings.estimator is Estimator.category:
        estimate[seen] = run.bank.whole("category_agreement")[seen]
    elif settings.estimator is Estimator.oracle:
        wrong = run.data.labels.mismatched()
        if wrong is not None:
            estimate = torch.from_numpy(~wrong).float().to(estimate.device)
    if trusted:
        if run.notes.get("correspondence_estimated"):
            estimate = torch.lerp(estimate, run.bank.whole("correspondence"), settings.correspondence_momentum)
        run.notes["correspondence_estimated"] = True
        run.bank.believe(estimate)
        run.monitor.histogram("pairs/correspondence", estimate, step)
        weights = sample_weights(estimate, settings.weight_min)
        run.monitor.histogram("pairs/weight", weights, step)
        record["pairs/weight_mean"] = float(weights.mean())
    wrong = run.data.labels.mismatched()
    if wrong is not None and wrong.any():
        agreement = run.bank.whole("category_agreement").cpu().numpy()
        record |= {
            "pairs/auroc_similarity": auroc(similarity.nan_to_num().cpu().numpy(), ~wrong),
            "pairs/auroc_category_agreement": auroc(agreement, ~wrong),
        }
    run.monitor.record(step, record)
