"""Normalization of probability tables.

Legend: t rows, C classes, R rates.
"""

from torch import Tensor

SMALLEST = 1e-30


def normalize_rows(table: Tensor) -> Tensor:
    """Scale the rows of a non-negative table to sum 1: [t, C] -> [t, C]; rows of zeros stay zero."""
    return table / table.sum(1, keepdim=True).clamp_min(SMALLEST)


def normalize_likelihood(log_likelihood: Tensor) -> Tensor:
    """Return the posterior under a uniform prior, likelihoods scaled to sum 1: [R] -> [R]."""
    likelihood = (log_likelihood - log_likelihood.max()).exp()
    return likelihood / likelihood.sum()
