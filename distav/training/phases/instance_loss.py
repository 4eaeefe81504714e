"""The instance loss of a contrastive phase: what a pair is told from, how, and how far it is believed."""

import torch
from torch import Tensor

from distav.config.phases import ContrastivePhase, Estimator, InstanceLoss, NegativesSource
from distav.data.pipeline.loader import Batch
from distav.losses.active_complementary import active_complementary_loss
from distav.losses.info_nce import WITHIN, InBatchNegatives, SampledNegatives, cross_entropy, noise_contrastive
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling, Partition
from distav.noise.correspondence import sample_weights
from distav.training.phases.correspondence import Refinement
from distav.training.run import Run


class InstanceTerm:
    """Losses and weights of a batch's pairs; keeps their correspondence where it is refined at every visit."""

    def __init__(self, run: Run, settings: ContrastivePhase):
        self.run, self.settings = run, settings
        self.soft = SoftTargets(
            settings.soft_targets.name,
            settings.soft_target_temperature,
            settings.cycle_temperature,
            settings.soft_target_excludes_self,
        )
        self.partition = Partition(run.state.nce_partition) if settings.nce else None
        self.refinement = Refinement(run, settings) if settings.correspondence_estimator is Estimator.scc else None

    def __call__(
        self, outputs: dict[str, Tensor], batch: Batch, visitors: GlobalBatch, progress: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of this rank's samples [b], their weights, and how far each is believed to be a pair.

        The last two differ for the complementary loss, which has the belief in itself.

        Args:
            outputs: of the network.
            batch: of this rank.
            visitors: of all ranks.
            progress: of the phase, 0..1.
        """
        settings, bank = self.settings, self.run.bank
        pair, present = (outputs["visual"], outputs["audio"]), batch.valid.float()
        temperature = outputs.get("temperature", settings.temperature)
        trust = 1.0 if self.refinement else ramp(progress, settings.pair_weighting_start, settings.pair_weighting_ramp)
        candidates = self._candidates(visitors, pair, temperature)
        if self.refinement and candidates:
            believed = self.refinement(visitors, candidates.matching_probability(), candidates.num_candidates())
        else:
            believed = bank.fetch(("correspondence",), visitors.ids)[0]
        pair_weights = present * (1 + trust * (sample_weights(believed, settings.min_pair_weight) - 1))
        weights = pair_weights
        if candidates and settings.loss is InstanceLoss.acl:
            weights = present
            each = candidates.losses(
                active_complementary_loss(1 + trust * (believed - 1), settings.complementary_weight)
            )
        elif candidates:
            each = candidates.losses(noise_contrastive(self.partition) if self.partition else cross_entropy)
            if self.partition:
                self.run.state.nce_partition = self.partition.value
        else:
            softens = trust > 0 and (
                settings.soft_targets_for_all or settings.correspondence_estimator is not Estimator.none
            )
            doubt = torch.ones_like(believed) if settings.soft_targets_for_all else 1 - believed
            share = trust * settings.soft_target_weight * doubt if softens else None
            each, matching, number = instance_losses(
                bank, visitors, *pair, temperature, share, self.soft, mask_uninitialized=settings.mask_uninitialized
            )
            if self.refinement:
                self.refinement(visitors, matching, number)
        if settings.within_modal_weight:
            within = instance_losses(bank, visitors, *pair, temperature, directions=WITHIN)
            each = each + settings.within_modal_weight * within.losses
        return each, weights, pair_weights

    def _candidates(
        self, visitors: GlobalBatch, pair: tuple[Tensor, Tensor], temperature: float | Tensor
    ) -> InBatchNegatives | SampledNegatives | None:
        """Return what a pair is told from, where that is not the whole bank."""
        run, settings = self.run, self.settings
        if settings.negatives_source is NegativesSource.batch:
            return InBatchNegatives(visitors, *pair, temperature)
        if settings.num_negatives:
            draw = NegativeSampling(settings.num_negatives, run.settings.run.seed, run.progress.total_steps)
            return SampledNegatives(run.bank, visitors, *pair, temperature, draw)
        return None


def ramp(progress: float, start: float, length: float) -> float:
    """Return 0 before `start`, 1 from `start + length` on, linear between; all are shares of a phase."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / length) if length else 1.0
