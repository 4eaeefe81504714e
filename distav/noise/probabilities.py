"""Normalization and entropy of probability tables.

Legend: t rows, C classes, R rates, S inverse temperatures.
"""

from torch import Tensor

SMALLEST = 1e-30


def normalize_rows(table: Tensor) -> Tensor:
    """Scale the rows of a non-negative table to sum 1: [t, C] -> [t, C]; rows of zeros stay zero."""
    return table / table.sum(1, keepdim=True).clamp_min(SMALLEST)


def row_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of each row in nats: [t, C] -> [t]."""
    return -(probs * probs.clamp_min(SMALLEST).log_()).sum(1)


def normalize_likelihood(log_likelihood: Tensor, marginalized_dim: int | None = None) -> Tensor:
    """Return the posterior under a uniform prior: likelihoods scaled to sum 1.

    Args:
        log_likelihood: [R] or [R, S].
        marginalized_dim: dimension that is summed out; None keeps all.
    """
    likelihood = (log_likelihood - log_likelihood.max()).exp()
    if marginalized_dim is not None:
        likelihood = likelihood.sum(marginalized_dim)
    return likelihood / likelihood.sum()
