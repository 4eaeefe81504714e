"""Bounds of a top-k search: scores that the k-th best key of a query is known or expected to reach."""

import math


def is_zero_or_power_of_two(number: int) -> bool:
    """Whether the number is 0 or a power of two: the numbers of scanned tiles at which a search raises its bounds."""
    return number & (number - 1) == 0


def bound_rank(k: int, fraction: float, estimate_bound: bool) -> int:
    """Return the rank, among the scores of a fraction of all keys, of the score that becomes the bound.

    The k-th best score of a part of the keys is never above the k-th best of all keys. An estimated bound is higher,
    so that fewer scores reach it: the score of rank r where r - 4 sqrt(r) = k * fraction, the number of the k best
    that are expected among these keys, with a margin of four standard deviations. It is above the k-th best of all
    keys for less than one query in ten thousand.

    Args:
        k: keys wanted.
        fraction: fraction of the keys whose scores are known.
        estimate_bound: whether the bound may be estimated.
    """
    if not estimate_bound:
        return k
    return min(k, math.ceil(((4 + math.sqrt(16 + 4 * k * fraction)) / 2) ** 2))
