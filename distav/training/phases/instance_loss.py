"""Instance loss of a contrastive phase: a contrastive objective, pair weights and the within-modal loss."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distav.config.phases import ContrastivePhase, Estimator
from distav.data.pipeline.loader import Batch
from distav.losses.contrastive_objectives import PairBatch, select_objective
from distav.losses.info_nce import WITHIN_MODAL
from distav.losses.instance_discrimination import instance_losses
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import Partition
from distav.noise.correspondence import sample_weights
from distav.training.phases.correspondence import Refinement
from distav.training.run import Run


class WeightedLosses(NamedTuple):
    """Instance losses of this rank's samples.

    Attributes:
        losses: [b].
        weights: [b] weights of the losses; 0 for masked rows, and for samples with one modality if there is no
            within-modal loss.
        pair_weights: [b] weights of the pairs in the category-level loss, 0 for samples with one modality; they differ
            from `weights` where the losses account for the correspondence already.
    """

    losses: Tensor
    weights: Tensor
    pair_weights: Tensor


class InstanceTerm:
    """Computes the instance losses of a batch; refines the correspondence of its pairs if the estimator is scc.

    The cross-modal loss applies to pairs, the within-modal loss to every modality that a sample has.
    """

    def __init__(self, run: Run, config: ContrastivePhase):
        self.run, self.config = run, config
        self.partition = Partition(run.state.nce_partition)
        self.refinement = Refinement(run, config) if config.correspondence_estimator is Estimator.scc else None
        self.objective = select_objective(config)(config, run.bank, run.config.run.seed, self.partition)
        self.has_pairs = run.bank.has_pairs()
        self.within_modal = tuple(
            (query, key) for query, key in WITHIN_MODAL if config.within_modal_weight and run.bank.has_modality(key)
        )

    def __call__(
        self, outputs: dict[str, Tensor], batch: Batch, global_batch: GlobalBatch, progress: float
    ) -> WeightedLosses:
        """Return the losses and weights of this rank's samples.

        Args:
            outputs: outputs of the network.
            batch: batch of this rank.
            global_batch: embeddings of all ranks.
            progress: fraction of the phase that is done.
        """
        config = self.config
        visual, audio, paired = outputs["visual"], outputs["audio"], batch.paired.float()
        temperature = outputs.get("temperature", config.temperature)
        trust = 1.0 if self.refinement else ramp(progress, config.pair_weighting_start, config.pair_weighting_ramp)
        refine = partial(self.refinement, global_batch) if self.refinement else None
        if self.has_pairs:
            step = self.run.progress.total_steps
            result = self.objective(PairBatch(global_batch, visual, audio, temperature, trust, step, refine))
            if config.nce:
                self.run.state.nce_partition = self.partition.value
            losses, includes_weights = result.losses, result.includes_weights
            pair_weights = paired * (1 + trust * (sample_weights(result.correspondence, config.min_pair_weight) - 1))
        else:
            losses, pair_weights, includes_weights = torch.zeros_like(paired), paired, False
        weights = paired if includes_weights else pair_weights
        if self.within_modal:
            within = instance_losses(
                self.run.bank, global_batch, visual, audio, temperature, directions=self.within_modal
            ).losses
            losses = torch.where(batch.paired, losses, torch.zeros_like(losses)) + config.within_modal_weight * within
            weights = torch.where(batch.paired, weights, batch.valid.float())
        return WeightedLosses(losses, weights, pair_weights)


def ramp(progress: float, start: float, length: float) -> float:
    """Return 0 before `start`, 1 from `start + length` on, and linear values between; all are fractions of a phase."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / length) if length else 1.0
