"""What frozen features are worth: weighted nearest neighbours and a linear probe.

Legend: N training clips, m others, E width, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the squared length of a probe's coefficients, tried on a fifth of the training clips."""
_HELD_OUT = 5
_SCORES = 2**24
"""Similarities that are ranked at a time."""


def knn_class_probs(
    keys: Tensor, classes: Tensor, queries: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return the votes of the k nearest, weighed by exp(cosine / temperature) (Wu et al. 2018, section 3.4).

    Args:
        keys: [N, E] features; those all zero vote for nobody.
        classes: [N] their classes.
        queries: [m, E] features that are voted on.
        num_classes: C.
        k: neighbours, at most N.
        temperature: of the weights.

    Returns:
        [m, C] votes.
    """
    there = keys.norm(dim=1) > 0
    keys, classes = F.normalize(keys[there].float(), dim=1), classes[there]
    votes = torch.zeros(len(queries), num_classes, device=queries.device)
    block = max(1, _SCORES // max(1, len(keys)))
    for start in range(0, len(queries), block):
        asked = F.normalize(queries[start : start + block].float(), dim=1)
        nearest = (asked @ keys.T).topk(min(k, len(keys)), dim=1)
        # The largest weight is 1, so that none overflows.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes[start : start + block].scatter_add_(1, classes[nearest.indices], weights)
    return votes


class LinearProbe:
    """Multinomial logistic regression on standardised features, by L-BFGS; its penalty is chosen on held-out clips."""

    def __init__(self, features: Tensor, classes: Tensor, num_classes: int, groups: Tensor):
        """Fit.

        Args:
            features: [N, E].
            classes: [N].
            num_classes: C.
            groups: [N] clips of one group, such as those of one video, are held out together.
        """
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.num_classes = num_classes
        inputs = self._standard(features)
        held = _shuffled(groups) % _HELD_OUT == 0
        self.penalty = PENALTIES[-1]
        if held.any() and not held.all():
            found = [self._fit(inputs[~held], classes[~held], penalty) for penalty in PENALTIES]
            losses = [float(F.cross_entropy(_logits(inputs[held], each), classes[held])) for each in found]
            self.penalty = PENALTIES[losses.index(min(losses))]
        self.coefficients = self._fit(inputs, classes, self.penalty)

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits: [m, E] -> [m, C]."""
        return _logits(self._standard(features), self.coefficients)

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def _fit(self, inputs: Tensor, classes: Tensor, penalty: float) -> Tensor:
        """Return coefficients and offsets, [E + 1, C]."""
        found = torch.zeros(inputs.shape[1] + 1, self.num_classes, device=inputs.device, requires_grad=True)
        solver = torch.optim.LBFGS([found], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(_logits(inputs, found), classes) + penalty * found[:-1].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            solver.step(loss)  # pyright: ignore[reportArgumentType]
        return found.detach()


def _logits(inputs: Tensor, coefficients: Tensor) -> Tensor:
    return inputs @ coefficients[:-1] + coefficients[-1]


def _shuffled(groups: Tensor) -> Tensor:
    """Return numbers that are the same within a group and otherwise in no order: [N] int64."""
    places = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(0))
    return places.to(groups.device)[groups]
