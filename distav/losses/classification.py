"""Classification losses for labels that may be wrong: cross-entropy, generalized cross-entropy, ELR and SOP.

Two losses for several labels per clip: binary cross-entropy and the asymmetric loss.

`phases.*.loss` of a supervised phase names an entry of `CLASSIFICATION_LOSSES`. Another package adds a loss by an entry
point of the group `distav.classification_losses` that refers to a subclass of `ClassificationLoss`:

    class SmoothedCrossEntropy(ClassificationLoss):
        def __call__(self, global_batch, logits, targets):
            return [soft_cross_entropy(head, 0.9 * target + 0.1 / self.num_classes)
                    for head, target in zip(logits, targets, strict=True)]

Legend: b samples of this rank, H classifiers, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.config.registry import Registry
from distav.losses.multi_label import asymmetric_loss, binary_cross_entropy
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch


class ClassificationLoss(ABC):
    """Loss of the classifiers of a model.

    Attributes:
        multi_label: whether the targets may be a probability of each class, instead of one distribution over the
            classes; such a loss treats the classes as independent.
        keeps_predictions: whether the loss stores predictions of single samples, so that it does not allow mixup.
        config: settings of the phase.
        column: column of the memory bank in which the loss keeps a state per sample; empty if it keeps none.
            Checkpoints contain it, and it is removed at the end of the phase.
        bank: memory bank.
        num_heads: number of classifiers H.
        num_classes: number of classes C.
    """

    multi_label: ClassVar[bool] = False
    keeps_predictions: ClassVar[bool] = False
    column: ClassVar[str] = ""

    def __init__(self, config: SupervisedPhase, bank: Bank, num_heads: int, num_classes: int):
        self.config, self.bank, self.num_heads, self.num_classes = config, bank, num_heads, num_classes

    def end_phase(self) -> None:
        """Remove the column, so that the next phase of this loss starts without it; called after the last batch."""
        if self.column:
            self.bank.pop_column(self.column)

    @abstractmethod
    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses of this rank's samples, [b] for each classifier; called once per batch on every rank.

        Args:
            global_batch: ids of the batch of all ranks, to read and write columns of the memory bank.
            logits: [b, C] for each classifier, with gradient; adjusted by `logit_adjustment`.
            targets: [b, C] class distributions for each classifier; independent probabilities of the classes if the
                dataset is multi-label.
        """


class CrossEntropy(ClassificationLoss):
    """Cross-entropy."""

    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses: [b] for each classifier."""
        return [soft_cross_entropy(head, target) for head, target in zip(logits, targets, strict=True)]


class GeneralizedCrossEntropy(ClassificationLoss):
    """Generalized cross-entropy (Zhang and Sabuncu 2018), robust to wrong labels."""

    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses: [b] for each classifier."""
        q = self.config.gce_q
        return [generalized_cross_entropy(head, target, q) for head, target in zip(logits, targets, strict=True)]


class EarlyLearning(ClassificationLoss):
    """Cross-entropy with early-learning regularization (ELR; Liu et al. 2020).

    The moving average of each sample's predictions is kept in the column `predictions` of the memory bank: [n, H, C].
    """

    column = "predictions"
    keeps_predictions = True

    def __init__(self, config: SupervisedPhase, bank: Bank, num_heads: int, num_classes: int):
        super().__init__(config, bank, num_heads, num_classes)
        bank.register_column(self.column, (num_heads, num_classes))

    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses, [b] for each classifier, and update the moving average."""
        averages = self._update(global_batch, logits)
        return [
            soft_cross_entropy(head, target) + self.config.elr_weight * early_learning_regularization(head, average)
            for head, target, average in zip(logits, targets, averages.unbind(1), strict=True)
        ]

    def _update(self, global_batch: GlobalBatch, logits: Sequence[Tensor]) -> Tensor:
        """Mix the current predictions into the moving average and return it: [b, H, C]."""
        current = torch.stack([head.detach().softmax(1).clamp(1e-4, 1 - 1e-4) for head in logits], dim=1)
        current = current / current.sum(2, keepdim=True)
        average = self.bank.fetch((self.column,), global_batch.ids)[0]
        average = torch.lerp(current, average, self.config.elr_momentum)
        self.bank.write(self.column, average, global_batch.ids, global_batch.valid)
        return average


class OverParameterization(ClassificationLoss):
    """Sparse over-parameterization (SOP; Liu et al. 2022): each sample has variables that explain a wrong label.

    With the target y and the prediction p of a sample, its variables u and v give s = u^2 y - v^2 (1 - y), both terms
    at most 1, which is added to p. The network minimizes the cross-entropy of max(p + s, 0), scaled to a sum of 1. The
    u minimize the sum of this and of the squared error of the predicted class plus s, and the v the latter alone, by
    plain gradient descent with learning rates of their own. They start at 1e-8, so that they stay small unless the
    network disagrees with a label for long. The column `over_parameters` of the memory bank holds their distance from
    the start: [n, H, 2, C].
    """

    START, EPS = 1e-8, 1e-4
    column = "over_parameters"
    keeps_predictions = True

    def __init__(self, config: SupervisedPhase, bank: Bank, num_heads: int, num_classes: int):
        super().__init__(config, bank, num_heads, num_classes)
        bank.register_column(self.column, (num_heads, 2, num_classes))

    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses, [b] for each classifier, and update the variables."""
        moved = self.bank.fetch((self.column,), global_batch.ids)[0]
        target = torch.stack([values.detach() for values in targets], dim=1)
        probs = torch.stack([head.detach().float().softmax(1) for head in logits], dim=1)
        with torch.enable_grad():
            variables = (self.START + moved).detach().requires_grad_()
            added, removed = self._explained(variables, target)
            cross_entropy = self._cross_entropy(probs, added - removed.detach(), target)
            predicted = torch.nn.functional.one_hot(probs.argmax(2), self.num_classes)
            total = cross_entropy.sum() + (predicted + added - removed - target).square().sum()
            gradient = torch.autograd.grad(total, variables)[0] / len(global_batch.ids)
        rates = gradient.new_tensor([self.config.sop_lr_u, self.config.sop_lr_v])[:, None]
        self.bank.write(self.column, moved - rates * gradient, global_batch.ids, global_batch.valid)
        explained = (added - removed).detach().unbind(1)
        return [
            self._cross_entropy(head.softmax(1), shift, goal)
            for head, shift, goal in zip(logits, explained, targets, strict=True)
        ]

    @staticmethod
    def _explained(variables: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return u^2 y and v^2 (1 - y), each at most 1: [b, H, 2, C], [b, H, C] -> [b, H, C] twice."""
        added, removed = variables.square().unbind(2)
        return (added * target).clamp(max=1), (removed * (1 - target)).clamp(max=1)

    def _cross_entropy(self, probs: Tensor, explained: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of the shifted predictions: [..., C] three times -> [...]."""
        shifted = (probs + explained).clamp(min=self.EPS)
        return -(target * (shifted / shifted.sum(-1, keepdim=True)).clamp(self.EPS, 1).log()).sum(-1)


class BinaryCrossEntropy(ClassificationLoss):
    """Binary cross-entropy, summed over the classes."""

    multi_label = True

    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses: [b] for each classifier."""
        return [binary_cross_entropy(head, target) for head, target in zip(logits, targets, strict=True)]


class AsymmetricLoss(ClassificationLoss):
    """Asymmetric loss (ASL; Ridnik et al. 2021), summed over the classes."""

    multi_label = True

    def __call__(
        self, global_batch: GlobalBatch, logits: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the losses: [b] for each classifier."""
        config = self.config
        focusing = config.asymmetric_gamma_negative, config.asymmetric_gamma_positive, config.asymmetric_clip
        return [asymmetric_loss(head, target, *focusing) for head, target in zip(logits, targets, strict=True)]


CLASSIFICATION_LOSSES: Registry[type[ClassificationLoss]] = Registry(
    "phases.*.loss",
    "distav.classification_losses",
    {
        "ce": CrossEntropy,
        "gce": GeneralizedCrossEntropy,
        "elr": EarlyLearning,
        "sop": OverParameterization,
        "bce": BinaryCrossEntropy,
        "asymmetric": AsymmetricLoss,
    },
)
"""Classification losses by the name that `phases.*.loss` of a supervised phase gives."""


def hybrid_targets(given: Tensor, corrected: Tensor, confidence: Tensor) -> Tensor:
    """Return the mixture of given label and vote, r * onehot(given) + (1 - r) * corrected: [b, C].

    r is the vote's probability of the given label for a confident vote (confidence 0.5 or more), else one half.

    Args:
        given: [b] int64 given labels.
        corrected: [b, C] class probabilities of the votes; each row sums to 1.
        confidence: [b] largest probability of each vote.
    """
    agreement = corrected.gather(1, given[:, None]).squeeze(1)
    trust = torch.where(confidence >= 0.5, agreement, torch.full_like(agreement, 0.5))[:, None]
    return ((1 - trust) * corrected).scatter_add(1, given[:, None], trust)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy with the target distributions: logits and targets [b, C] -> [b]."""
    return -(targets * logits.log_softmax(1)).sum(1)


def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float) -> Tensor:
    """Return sum_c t_c (1 - p_c^q) / q (Zhang and Sabuncu 2018, equation 6): logits and targets [b, C] -> [b].

    The loss lies between cross-entropy (q -> 0) and mean absolute error (q = 1); a wrong label costs at most 1/q.
    """
    powers = (q * logits.log_softmax(1)).exp()
    return (targets * (1 - powers)).sum(1) / q


def early_learning_regularization(logits: Tensor, averages: Tensor) -> Tensor:
    """Return log(1 - <p, t>) with predictions p and their moving average t (Liu et al. 2020, equation 6): [b].

    It keeps predictions close to what the model learned before it fitted wrong labels.

    Args:
        logits: [b, C].
        averages: [b, C] moving average of earlier predictions, without gradient.
    """
    p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    return torch.log1p(-(averages * p).sum(1).clamp(max=1 - 1e-4))
