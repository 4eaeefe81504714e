"""Contrastive objectives: the cross-modal instance loss of a batch, one class per source of negatives.

`phases.*.negatives_source` names an entry of `CONTRASTIVE_OBJECTIVES`. Another package adds an objective by an entry
point of the group `distav.contrastive_objectives` that refers to a subclass of `ContrastiveObjective`:

    class NearestNegative(ContrastiveObjective):
        def __call__(self, pairs: PairBatch) -> PairLosses:
            correspondence = self.bank.fetch(("correspondence",), pairs.global_batch.ids)[0]
            negatives = InBatchNegatives(pairs.global_batch, pairs.visual, pairs.audio, pairs.temperature)
            return PairLosses(negatives.losses(hardest_negative_loss), correspondence)

Legend: b samples of this rank, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.phases import ContrastivePhase, Estimator, InstanceLoss, SoftTargetKind
from distav.config.registry import Registry
from distav.losses.active_complementary import active_complementary_loss
from distav.losses.info_nce import InBatchNegatives, SampledNegatives, cross_entropy, noise_contrastive
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling, Partition

RefineCorrespondence = Callable[[Tensor, Tensor | int], Tensor]
"""Matching probabilities [b] and the number of candidates they refer to -> trusted correspondence probabilities [b].

The call also stores the refined correspondence in the memory bank. Every rank has to call it once per batch."""


@dataclass(frozen=True)
class PairBatch:
    """Audio-visual pairs of a batch, the input of an objective.

    Attributes:
        global_batch: embeddings of all ranks, without gradient.
        visual, audio: [b, D] unit vectors of this rank, with gradient.
        temperature: tau; a tensor without dimensions receives a gradient.
        trust: degree from 0 to 1 to which correspondence probabilities are used; it rises during the phase.
        step: training steps of the run so far.
        refine: self-refinement of the correspondence; None where the estimator of the phase does not need it.
    """

    global_batch: GlobalBatch
    visual: Tensor
    audio: Tensor
    temperature: float | Tensor
    trust: float
    step: int
    refine: RefineCorrespondence | None


class PairLosses(NamedTuple):
    """Result of an objective.

    Attributes:
        losses: [b] loss of each pair.
        correspondence: [b] correspondence probability of each pair, from which its weights are computed.
        includes_weights: whether the losses account for the correspondence already, so that pairs have equal weights.
    """

    losses: Tensor
    correspondence: Tensor
    includes_weights: bool = False


class ContrastiveObjective(ABC):
    """Cross-modal instance loss of a batch.

    Attributes:
        config: settings of the phase.
        bank: memory bank; an objective reads it, and may add columns of its own.
        seed: seed of the run.
        partition: partition constant of noise-contrastive estimation, which is stored with the run.
    """

    def __init__(self, config: ContrastivePhase, bank: Bank, seed: int, partition: Partition):
        self.config, self.bank, self.seed, self.partition = config, bank, seed, partition

    @classmethod  # noqa: B027
    def validate(cls, config: ContrastivePhase, key: str) -> None:
        """Check the settings of a phase that uses this objective; the default accepts all.

        Args:
            config: settings of the phase.
            key: the phase's key, e.g. `phases.learn`, for error messages.

        Raises:
            UserError: if the settings contradict each other.
        """

    @abstractmethod
    def __call__(self, pairs: PairBatch) -> PairLosses:
        """Return the losses of this rank's pairs."""


class MemoryBankObjective(ContrastiveObjective):
    """Instance discrimination against all rows of the memory bank, with soft targets (RAVID)."""

    def __init__(self, config: ContrastivePhase, bank: Bank, seed: int, partition: Partition):
        super().__init__(config, bank, seed, partition)
        self.soft_targets = SoftTargets(
            config.soft_targets.name,
            config.soft_target_temperature,
            config.cycle_temperature,
            config.soft_target_excludes_self,
        )

    @classmethod
    def validate(cls, config: ContrastivePhase, key: str) -> None:
        """Reject the active complementary loss and noise-contrastive estimation, which need few candidates."""
        if config.loss is InstanceLoss.acl:
            raise UserError(
                f"{key}.loss=acl: not possible with the complete memory bank. Set {key}.negatives_source=batch, or "
                f"{key}.num_negatives to the number of sampled rows, e.g. 127."
            )
        _reject_nce_without_sampling(config, key)

    def __call__(self, pairs: PairBatch) -> PairLosses:
        """Return the losses of this rank's pairs; refined correspondences apply from the next visit on."""
        config, trust = self.config, pairs.trust
        correspondence = self.bank.fetch(("correspondence",), pairs.global_batch.ids)[0]
        softness = None
        if trust > 0 and (config.soft_targets_for_all or config.correspondence_estimator is not Estimator.none):
            doubt = torch.ones_like(correspondence) if config.soft_targets_for_all else 1 - correspondence
            softness = trust * config.soft_target_weight * doubt
        losses, matching, num_candidates = instance_losses(
            self.bank,
            pairs.global_batch,
            pairs.visual,
            pairs.audio,
            pairs.temperature,
            softness,
            self.soft_targets,
            mask_uninitialized=config.mask_uninitialized,
        )
        if pairs.refine:
            pairs.refine(matching, num_candidates)
        return PairLosses(losses, correspondence)


class _NegativesObjective(ContrastiveObjective):
    """Loss over the scores of a pair and its negatives, with hard targets."""

    @abstractmethod
    def negatives(self, pairs: PairBatch) -> InBatchNegatives | SampledNegatives:
        """Return the scores of the pairs."""

    def __call__(self, pairs: PairBatch) -> PairLosses:
        """Return the losses of this rank's pairs; refined correspondences apply at once."""
        negatives = self.negatives(pairs)
        if pairs.refine:
            correspondence = pairs.refine(negatives.matching_probability(), negatives.num_candidates())
        else:
            correspondence = self.bank.fetch(("correspondence",), pairs.global_batch.ids)[0]
        if self.config.loss is InstanceLoss.acl:
            trusted = 1 + pairs.trust * (correspondence - 1)
            losses = negatives.losses(active_complementary_loss(trusted, self.config.complementary_weight))
            return PairLosses(losses, correspondence, includes_weights=True)
        score_loss = noise_contrastive(self.partition) if self.config.nce else cross_entropy
        return PairLosses(negatives.losses(score_loss), correspondence)


class InBatchObjective(_NegativesObjective):
    """InfoNCE or the active complementary loss (CRCL); negatives are the other samples of the global batch."""

    @classmethod
    def validate(cls, config: ContrastivePhase, key: str) -> None:
        """Reject settings of the memory bank and of sampled negatives."""
        if config.num_negatives:
            raise UserError(
                f"{key}.num_negatives={config.num_negatives}: negatives are sampled from the memory bank only. Set "
                f"{key}.negatives_source=memory_bank, or num_negatives=0 to use the batch."
            )
        _reject_nce_with_acl(config, key)
        _reject_nce_without_sampling(config, key)
        _reject_memory_bank_settings(config, key, f"{key}.negatives_source=batch")

    def negatives(self, pairs: PairBatch) -> InBatchNegatives:
        """Return the scores of the pairs within the global batch."""
        return InBatchNegatives(pairs.global_batch, pairs.visual, pairs.audio, pairs.temperature)


class SampledObjective(_NegativesObjective):
    """InfoNCE, NCE (AVID) or the active complementary loss; negatives are sampled rows of the memory bank."""

    @classmethod
    def validate(cls, config: ContrastivePhase, key: str) -> None:
        """Reject settings of the complete memory bank."""
        if not config.num_negatives:
            raise UserError(
                f"{key}.negatives_source={config.negatives_source}: needs the number of sampled rows. Set "
                f"{key}.num_negatives (AVID: 1024), or negatives_source=memory_bank for the complete memory bank."
            )
        _reject_nce_with_acl(config, key)
        _reject_memory_bank_settings(config, key, f"{key}.num_negatives={config.num_negatives}")

    def negatives(self, pairs: PairBatch) -> SampledNegatives:
        """Return the scores of the pairs among rows that are sampled again at each step."""
        sampling = NegativeSampling(self.config.num_negatives, self.seed, pairs.step)
        return SampledNegatives(self.bank, pairs.global_batch, pairs.visual, pairs.audio, pairs.temperature, sampling)


CONTRASTIVE_OBJECTIVES: Registry[type[ContrastiveObjective]] = Registry(
    "phases.*.negatives_source",
    "distav.contrastive_objectives",
    {"memory_bank": MemoryBankObjective, "sampled": SampledObjective, "batch": InBatchObjective},
)
"""Objectives by the name that `phases.*.negatives_source` gives."""


def select_objective(config: ContrastivePhase, key: str = "phases.*") -> type[ContrastiveObjective]:
    """Return the objective of a contrastive phase; `memory_bank` with `num_negatives` above 0 selects `sampled`.

    Raises:
        UserError: if there is no objective with this name.
    """
    sampled = config.negatives_source == "memory_bank" and config.num_negatives > 0
    name = "sampled" if sampled else config.negatives_source
    return CONTRASTIVE_OBJECTIVES.select(name, f"{key}.negatives_source")


def _reject_nce_with_acl(config: ContrastivePhase, key: str) -> None:
    if config.loss is InstanceLoss.acl and config.nce:
        raise UserError(f"{key}.nce=true: not possible with {key}.loss=acl. Set {key}.loss=xid or nce=false.")


def _reject_nce_without_sampling(config: ContrastivePhase, key: str) -> None:
    if config.nce:
        raise UserError(
            f"{key}.nce=true: needs sampled negatives. Set {key}.num_negatives (AVID: 1024), or nce=false for the "
            "softmax over all candidates."
        )


def _reject_memory_bank_settings(config: ContrastivePhase, key: str, cause: str) -> None:
    """Reject soft targets and the mask, which are defined over the complete memory bank only."""
    if config.loss is not InstanceLoss.acl and config.soft_targets is not SoftTargetKind.none:
        raise UserError(
            f"{key}.soft_targets={config.soft_targets.name}: {cause} allows hard targets only. Set "
            f"{key}.soft_targets=none, or negatives_source=memory_bank and num_negatives=0 to use the complete memory "
            "bank."
        )
    if config.mask_uninitialized:
        raise UserError(
            f"{key}.mask_uninitialized=true: not possible with {cause}; it applies to the complete memory bank only. "
            f"Set {key}.mask_uninitialized=false."
        )
