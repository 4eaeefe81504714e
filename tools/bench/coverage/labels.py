"""Given labels of a problem: true labels with noise.

- ``symmetric``: all other classes are equally likely.
- ``prior``: other classes are as likely as their frequencies.
- ``next``: the next class.
- ``confusable``: one of the two classes whose features are nearest.
- ``matrix``: a random transition matrix; the rates of the classes differ.
- ``instance``: labels are wrong where the features are near another class, and name that class. Where they are wrong
  with a probability close to 1, they look like labels of that class in the features of this modality.

Legend: N samples, C classes.
"""

from dataclasses import dataclass

import numpy as np

from tools.bench.coverage.problem import CoverageProblem

NEAREST_WEIGHT = 0.7
"""Fraction of the errors that name the nearest class under "confusable" noise; the others name the second nearest."""
MAX_ENTRY_RATIO = 0.8
"""Largest entry of a row of a random transition matrix, relative to that of the right label."""


@dataclass(frozen=True, eq=False)
class LabelDraws:
    """Uniform random numbers of each sample, equal for samples with the same error: [N] each."""

    error: np.ndarray
    label: np.ndarray


def corrupt(
    problem: CoverageProblem,
    true: np.ndarray,
    frequencies: np.ndarray,
    class_centers: np.ndarray,
    distances: np.ndarray | None,
    draws: LabelDraws,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return given labels: [N] int64.

    Args:
        problem: noise and rate.
        true: [N] int64; samples with a class of C or larger get a label from the class frequencies.
        frequencies: [C] class frequencies.
        class_centers: [C, D] centers of the classes, for "confusable".
        distances: [N, C] distances to the classes, for "instance".
        draws: random numbers of the samples.
        rng: source of randomness of the transition matrix.
    """
    given = np.zeros_like(true)
    known = true < problem.num_classes
    given[~known] = _draw(np.broadcast_to(frequencies, (int((~known).sum()), len(frequencies))), draws.label[~known])
    error, label, classes = draws.error[known], draws.label[known], true[known]
    if problem.label_noise == "instance":
        assert distances is not None
        given[known] = _instance(problem, classes, distances[known], error)
        return given
    matrix = transition_matrix(problem, frequencies, class_centers, rng)
    wrong = error > matrix.diagonal()[classes]
    errors = matrix.copy()
    np.fill_diagonal(errors, 0.0)
    errors /= np.maximum(errors.sum(1, keepdims=True), 1e-12)
    given[known] = np.where(wrong, _draw(errors[classes], label), classes)
    return given


def transition_matrix(
    problem: CoverageProblem, frequencies: np.ndarray, class_centers: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return P(given | true) of noise that does not depend on the features: [C, C]; see `corrupt`."""
    num_classes, rate = problem.num_classes, problem.label_noise_rate
    if problem.label_noise == "matrix":
        return _random_matrix(num_classes, rate, rng)
    errors = np.zeros((num_classes, num_classes))
    classes = np.arange(num_classes)
    if problem.label_noise == "symmetric":
        errors[:] = 1.0
    elif problem.label_noise == "prior":
        errors[:] = frequencies
    elif problem.label_noise == "next":
        errors[classes, (classes + 1) % num_classes] = 1.0
    else:
        distances = ((class_centers[:, None] - class_centers[None]) ** 2).sum(2)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.argsort(1)
        if num_classes > 2:
            errors[classes, nearest[:, 1]] = 1 - NEAREST_WEIGHT
        errors[classes, nearest[:, 0]] = NEAREST_WEIGHT
    np.fill_diagonal(errors, 0.0)
    matrix = rate * errors / errors.sum(1, keepdims=True)
    np.fill_diagonal(matrix, 1 - rate)
    return matrix


def _random_matrix(num_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return a random transition matrix: rates of 0.4 to 1.6 times the mean, errors from a Dirichlet distribution."""
    rates = rate * rng.permutation(np.linspace(0.4, 1.6, num_classes)).clip(max=0.75 / max(rate, 1e-9))
    matrix = np.zeros((num_classes, num_classes))
    for label, wrong in enumerate(rates):
        # Mixed with the uniform distribution until the right label is the most likely one.
        errors = rng.dirichlet(np.full(num_classes - 1, 0.5))
        limit = MAX_ENTRY_RATIO * (1 - wrong) / max(wrong, 1e-9)
        excess = errors.max() - limit
        if excess > 0:
            uniform = 1 / (num_classes - 1)
            errors += min(1.0, excess / max(errors.max() - uniform, 1e-9)) * (uniform - errors)
        matrix[label, np.arange(num_classes) != label] = wrong * errors
        matrix[label, label] = 1 - wrong
    return matrix


def _instance(problem: CoverageProblem, classes: np.ndarray, distances: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return labels that name the nearest other class where it is near: [n], [n, C], [n] -> [n]."""
    rows = np.arange(len(classes))
    others = distances.copy()
    others[rows, classes] = np.inf
    nearest = others.argmin(1)
    margin = others[rows, nearest] - distances[rows, classes]
    # Ranks instead of distances, so that heavy tails do not determine the width of the transition.
    position = margin.argsort().argsort() / max(1, len(margin) - 1)
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        probability = problem.noise_peak * _sigmoid((middle - position) / problem.noise_softness)
        low, high = (middle, high) if probability.mean() < problem.label_noise_rate else (low, middle)
    return np.where(error < probability, nearest, classes) if problem.label_noise_rate > 0 else classes.copy()


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values.clip(-50, 50)))


def _draw(probs: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return a class for each row of probabilities from a uniform random number: [n, C], [n] -> [n] int64."""
    cumulative = probs.cumsum(1)
    return (uniform[:, None] * cumulative[:, -1:] >= cumulative).sum(1).clip(max=probs.shape[1] - 1)
