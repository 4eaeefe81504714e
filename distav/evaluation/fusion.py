"""Fusion of the classifiers of a clip by their reliability; the weights are fitted without true labels.

The joint classifier learns from pairs whose modalities agree, since pairs that disagree are probably mismatched and
have little weight in its loss. It therefore does not learn which modality is right where they disagree, and can be less
accurate than the better one. The class probabilities of clips with both modalities are instead

    p(c) = softmax(w_both log p_both(c) + w_visual log p_visual(c) + w_audio log p_audio(c))

The weights w maximize the likelihood of the given labels y of clips on whose labels no classifier was trained, times a
prior. v and a are the class probabilities of the single modalities, each with an inverse temperature of its own; pi are
the class frequencies, and T is the noise transition matrix. With probability m the audio of a clip does not belong to
its video; the label is then that of the video with probability u:

    L = prod_i sum_c T(c, y_i) [(1 - m) r_i p_i(c) + m (u v_i(c) + (1 - u) a_i(c))],  r_i = sum_c v_i(c) a_i(c) / pi(c)

Without the second term, mismatched pairs would count as errors of the audio. u is not fitted: an error of the visual
classifier and a mismatched pair whose label is that of the audio have the same labels.
Legend: n clips, C classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

CLASSIFIERS = {"both": "logits", "visual": "visual_logits", "audio": "audio_logits"}
"""Outputs of the network by classifier."""
MISMATCH_PRIOR = (-4.0, 1.0)
"""Mean and standard deviation of the log-odds of the mismatch rate where nothing is known about it.

A mismatched pair and an error of the audio classifier differ in the confidence of the classifier alone. The prior
therefore prefers errors; the mismatch rate of a label correction replaces it.
"""
_PRIOR = {
    "log w_both": (math.log(0.5), 1.0),
    "log w_visual / w_both": (math.log(0.15), 1.0),
    "log w_audio / w_both": (math.log(0.15), 1.0),
    "log inverse temperature of v": (math.log(0.5), 1.0),
    "log inverse temperature of a": (math.log(0.5), 1.0),
    "log odds of m": MISMATCH_PRIOR,
    "log odds of the noise rate, if T is unknown": (-1.0, 2.0),
}
"""Mean and standard deviation of the parameters.

A hundred noisy labels determine the weights poorly, so the prior matters: a little of each single modality corrects
many errors of a joint classifier that trusts one modality too much.
"""
_MAX_ITERATIONS = 200
_MIN_LIKELIHOOD = 1e-12
_DIGITS = 6
"""Decimal places of the weights, so that exports do not contain rounding errors."""


@dataclass(frozen=True)
class Fusion:
    """Weights of the log-probabilities of the classifiers.

    Attributes:
        both: weight of the joint classifier.
        visual, audio: weights of the classifiers of one modality.
    """

    both: float
    visual: float
    audio: float

    @classmethod
    def from_description(cls, description: Mapping[str, object]) -> Self | None:
        """Return the fusion of an exported network from its `config.json`; None if it has none."""
        weights = description["fusion"]
        return cls(**weights) if isinstance(weights, dict) else None

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the fused log-probabilities, not normalized: [n, C] float32.

        Args:
            outputs: `logits`, `visual_logits` and `audio_logits` of the network, [n, C] each.
        """
        return sum_weighted(
            torch.tensor([self.both, self.visual, self.audio], device=outputs["logits"].device),
            classifier_log_probs(outputs),
        )


def classifier_log_probs(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the classifiers in the order of `CLASSIFIERS`: [3, n, C] float32."""
    return torch.stack([outputs[name].float().log_softmax(1) for name in CLASSIFIERS.values()])


def sum_weighted(weights: Tensor, log_probs: Tensor) -> Tensor:
    """Return the weighted sum of log-probabilities: [3], [3, n, C] -> [n, C]."""
    return (weights[:, None, None] * log_probs).sum(0)


def fit_fusion(
    log_probs: Tensor,
    labels: Tensor,
    transition_matrix: Tensor | None = None,
    mismatch_prior: tuple[float, float] = MISMATCH_PRIOR,
    visual_owner: float = 1.0,
) -> Fusion:
    """Fit the weights to clips with both modalities.

    Args:
        log_probs: [3, n, C] result of `classifier_log_probs` on the CPU.
        labels: [n] int64 given labels, possibly wrong, on which the classifiers were not trained.
        transition_matrix: [C, C] T(c, y) = P(given label y | true class c); None for symmetric noise, whose rate is
            then estimated.
        mismatch_prior: mean and standard deviation of the log-odds of the mismatch rate.
        visual_owner: u, the fraction of the mismatched pairs whose label is that of the video.
    """
    prior = torch.tensor(list((_PRIOR | {"log odds of m": mismatch_prior}).values()), dtype=torch.float64)
    parameters = prior[:, 0].clone().requires_grad_()
    likelihood = _Likelihood(log_probs.double(), labels, transition_matrix, visual_owner)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=_MAX_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = ((parameters - prior[:, 0]) / prior[:, 1]).square().sum() / 2
        value = (penalty - likelihood(parameters)) / max(1, len(labels))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return Fusion(*(round(weight, _DIGITS) for weight in _weights(parameters.detach()).tolist()))


def _weights(parameters: Tensor) -> Tensor:
    """Return the weights of the classifiers: [7] -> [3]."""
    return torch.stack([parameters[0], parameters[0] + parameters[1], parameters[0] + parameters[2]]).exp()


class _Likelihood:
    """The logarithm of L, see the head of this file, as a function of the parameters in the order of `_PRIOR`."""

    def __init__(self, log_probs: Tensor, labels: Tensor, transition_matrix: Tensor | None, visual_owner: float):
        self.log_probs, self.labels, self.visual_owner = log_probs, labels, visual_owner
        self.num_classes = log_probs.shape[2]
        counts = torch.bincount(labels, minlength=self.num_classes).double() + 1
        self.class_frequencies = counts / counts.sum()
        self.label_probs = None if transition_matrix is None else transition_matrix.double().T[labels]

    def __call__(self, parameters: Tensor) -> Tensor:
        """Return log L, a scalar."""
        inverse_temperatures = parameters[3:5].exp()
        mismatch_rate, noise = parameters[5:].sigmoid()
        label_probs = self._symmetric_label_probs(noise) if self.label_probs is None else self.label_probs
        fused = sum_weighted(_weights(parameters), self.log_probs).softmax(1)
        visual, audio = (inverse_temperatures[:, None, None] * self.log_probs[1:]).softmax(2)
        agreement = (visual * audio / self.class_frequencies).sum(1)
        matched = (1 - mismatch_rate) * agreement * (fused * label_probs).sum(1)
        owner = self.visual_owner * visual + (1 - self.visual_owner) * audio
        mismatched = mismatch_rate * (owner * label_probs).sum(1)
        return (matched + mismatched).clamp_min(_MIN_LIKELIHOOD).log().sum()

    def _symmetric_label_probs(self, noise: Tensor) -> Tensor:
        """Return T(c, y_i) of symmetric noise, [n, C]; `noise` is its rate relative to that of random labels."""
        identity = torch.eye(self.num_classes, dtype=torch.float64)
        return torch.lerp(identity, torch.full_like(identity, 1 / self.num_classes), noise)[self.labels]
