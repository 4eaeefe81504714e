"""Classifiers on frozen features: weighted k-NN, logistic regression and linear support vector machines.

Legend: N training clips, m test clips, E width, C classes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.console import WorkCounter
from distav.losses.multi_label import binary_cross_entropy

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Candidate L2 penalties of a linear probe."""
MAX_FITS = len(PENALTIES) + 1
"""Fits of a linear probe; one if no clips can be held out to select the penalty."""
_FOLDS = 5
"""One fold of this number is held out to select the penalty."""
_BLOCK_SCORES = 2**24
"""Similarities that are ranked at a time."""


def knn_class_probs(
    keys: Tensor,
    classes: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    counter: WorkCounter | None = None,
) -> Tensor:
    """Return the fraction of the k nearest neighbors that are of each class.

    Neighbors are weighted by exp(cosine / temperature) (Wu et al. 2018, section 3.4). Fractions are comparable between
    queries, so that they can be averaged over the views of a clip, and ranked.

    Args:
        keys: [N, E] features; rows that are zero have no vote.
        classes: [N] classes of the keys.
        queries: [m, E] features.
        num_classes: C.
        k: number of neighbors, at most N.
        temperature: temperature of the weights.
        counter: counts the queries.

    Returns:
        [m, C] probabilities.
    """
    present = keys.norm(dim=1) > 0
    probs, classes = torch.zeros(len(queries), num_classes, device=queries.device), classes[present]
    for part, neighbors, weights in _weighted_neighbors(keys[present], queries, k, temperature, counter):
        probs[part].scatter_add_(1, classes[neighbors], weights)
    return probs


def knn_label_probs(
    keys: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    counter: WorkCounter | None = None,
) -> Tensor:
    """Return the weighted fraction of the k nearest neighbors that have each label; see `knn_class_probs`.

    Args:
        keys: [N, E] features; rows that are zero have no vote.
        labels: [N, C] bool labels of the keys.
        queries: [m, E] features.
        k: number of neighbors, at most N.
        temperature: temperature of the weights.
        counter: counts the queries.

    Returns:
        [m, C] probabilities.
    """
    present = keys.norm(dim=1) > 0
    probs, labels = torch.zeros(len(queries), labels.shape[1], device=queries.device), labels[present].float()
    for part, neighbors, weights in _weighted_neighbors(keys[present], queries, k, temperature, counter):
        # One neighbor at a time, to hold no table of the labels of all neighbors.
        for rank in range(neighbors.shape[1]):
            probs[part] += weights[:, rank, None] * labels[neighbors[:, rank]]
    return probs


def _weighted_neighbors(
    keys: Tensor, queries: Tensor, k: int, temperature: float, counter: WorkCounter | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of queries with the ids of their nearest keys and their weights, whose sum is 1, [b, k] each."""
    keys = F.normalize(keys.float(), dim=1)
    block = max(1, _BLOCK_SCORES // max(1, len(keys)))
    for start in range(0, len(queries), block):
        rows = F.normalize(queries[start : start + block].float(), dim=1)
        nearest = (rows @ keys.T).topk(min(k, len(keys)), dim=1)
        weights = (nearest.values / temperature).softmax(1)
        yield slice(start, start + block), nearest.indices, weights
        if counter:
            counter.advance(len(rows))


class LinearProbe:
    """Multinomial logistic regression on standardized features, fitted by L-BFGS.

    The L2 penalty is selected on a held-out fifth of the clips; all clips then fit the probe.

    Attributes:
        penalty: selected weight of the squared norm of the coefficients.
        coefficients: [E + 1, C], the last row is the bias.
    """

    def __init__(
        self,
        features: Tensor,
        classes: Tensor,
        num_classes: int,
        groups: Tensor,
        counter: WorkCounter | None = None,
    ):
        """Fit the probe.

        Args:
            features: [N, E].
            classes: [N].
            num_classes: C.
            groups: [N] group of each clip, such as its video; a group is held out as a unit.
            counter: counts the fits, `MAX_FITS` or one.
        """
        self._counter = counter
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.num_classes = num_classes
        inputs = self._standardize(features)
        held_out = _shuffled(groups) % _FOLDS == 0
        self.penalty = PENALTIES[-1]
        if held_out.any() and not held_out.all():
            candidates = [self._fit(inputs[~held_out], classes[~held_out], penalty) for penalty in PENALTIES]
            losses = [
                float(self._loss(_logits(inputs[held_out], coefficients), classes[held_out]))
                for coefficients in candidates
            ]
            self.penalty = PENALTIES[losses.index(min(losses))]
        self.coefficients = self._fit(inputs, classes, self.penalty)

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits: [m, E] -> [m, C]."""
        return _logits(self._standardize(features), self.coefficients)

    def scores(self, features: Tensor) -> Tensor:
        """Return what is averaged over the views of a clip, the probabilities of the classes: [m, E] -> [m, C]."""
        return self(features).softmax(1)

    @staticmethod
    def _loss(logits: Tensor, classes: Tensor) -> Tensor:
        """Return the mean loss of the clips, a scalar."""
        return F.cross_entropy(logits, classes)

    def _standardize(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def _fit(self, inputs: Tensor, classes: Tensor, penalty: float) -> Tensor:
        """Return the coefficients, [E + 1, C]."""
        coefficients = torch.zeros(inputs.shape[1] + 1, self.num_classes, device=inputs.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([coefficients], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = self._loss(_logits(inputs, coefficients), classes) + penalty * coefficients[:-1].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # pyright: ignore[reportArgumentType]
        if self._counter:
            self._counter.advance()
        return coefficients.detach()


class MultiLabelProbe(LinearProbe):
    """Logistic regression of each class on standardized features; its labels are [N, C] probabilities."""

    @staticmethod
    def _loss(logits: Tensor, classes: Tensor) -> Tensor:
        """Return the binary cross-entropy, summed over the classes, a scalar mean over the clips."""
        return binary_cross_entropy(logits, classes).mean()

    def scores(self, features: Tensor) -> Tensor:
        """Return the probability of each class: [m, E] -> [m, C]."""
        return self(features).sigmoid()


class LinearSVM(LinearProbe):
    """A linear support vector machine of each class against all others, with the squared hinge loss (L2-SVM)."""

    def scores(self, features: Tensor) -> Tensor:
        """Return the signed distances, in units of the margin: [m, E] -> [m, C]."""
        return self(features)

    @staticmethod
    def _loss(logits: Tensor, classes: Tensor) -> Tensor:
        """Return the squared hinge loss, summed over the classes, a scalar mean over the clips."""
        signs = 2 * F.one_hot(classes, logits.shape[1]).to(logits.dtype) - 1
        return (1 - signs * logits).relu().square().sum(1).mean()


class MultiLabelSVM(LinearSVM):
    """A linear support vector machine of each class; its labels are [N, C], 0 or 1."""

    def scores(self, features: Tensor) -> Tensor:
        """Return the sigmoid of the signed distances, 0.5 at the decision boundary: [m, E] -> [m, C]."""
        return self(features).sigmoid()

    @staticmethod
    def _loss(logits: Tensor, classes: Tensor) -> Tensor:
        """Return the squared hinge loss, summed over the classes, a scalar mean over the clips."""
        return (1 - (2 * classes - 1) * logits).relu().square().sum(1).mean()


def _logits(inputs: Tensor, coefficients: Tensor) -> Tensor:
    return inputs @ coefficients[:-1] + coefficients[-1]


def _shuffled(groups: Tensor) -> Tensor:
    """Return a random number of each group, the same for all of its clips: [N] int64."""
    numbers = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(0))
    return numbers.to(groups.device)[groups]
