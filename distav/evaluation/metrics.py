"""Scores of what was told beside what is true, and of features: tensors and arrays in, numbers out."""

from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from distav.distributed.collectives import all_gather_rows, all_gather_variable_rows, all_reduce_sum_, get_rank

RECALLED = (1, 5, 10)
_SCORES = 2**24
"""Scores of retrieval that are ranked at a time."""


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a positive scores above a negative, ties counted half; NaN without both kinds."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def label_accuracy(given: np.ndarray, corrected: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return how many labels are right before and after correction, and what it did to wrong and to right ones.

    Args:
        given, corrected, true: [N] class numbers.

    Returns:
        Shares: `given` and `corrected` right of all; `wrong_labels_fixed` of the wrong given ones; `right_labels_broken` of
        the right given ones. None where there are no such labels.
    """
    wrong = given != true
    right_now = corrected == true
    return {
        "given": float((~wrong).mean()),
        "corrected": float(right_now.mean()),
        "wrong_labels_fixed": float(right_now[wrong].mean()) if wrong.any() else None,
        "right_labels_broken": float((~right_now[~wrong]).mean()) if (~wrong).any() else None,
    }


def expected_calibration_error(shares: np.ndarray, true: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over bins of equal width (Guo et al. 2017, equation 3).

    Args:
        shares: [N, C] class shares.
        true: [N] class numbers.
        bins: of the confidence.
    """
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == true
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, right - confidence, minlength=bins))
    return float(gap[count > 0].sum() / len(true))


NOISE_KINDS = ["right", "wrong label", "wrong pair", "both wrong"]


def noise_kinds(wrong_label: np.ndarray, wrong_pair: np.ndarray) -> np.ndarray:
    """Return each sample's place in `NOISE_KINDS`: [N] bool twice -> [N] int64."""
    return wrong_label.astype(np.int64) + 2 * wrong_pair


def confusion(target: np.ndarray, predicted: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    """Return how often each kind was taken for each: rows are what is, columns what was told.

    Args:
        true, told: [N] int64 places in `kinds`.
        kinds: their names.
    """
    counts = np.zeros((len(kinds), len(kinds)), dtype=np.int64)
    np.add.at(counts, (target, predicted), 1)
    return {"kinds": kinds, "counts": counts.tolist()}


def retrieval(visual: Tensor, audio: Tensor, classes: Tensor) -> dict[str, float]:
    """Return how well pictures find sounds among all, and sounds pictures; exact, every rank asks for its own part.

    Keys are ranked by cosine, equal ones by their place. Recalls are for the one sound, or picture, of the same clip;
    average precision is for all of the same class.

    Args:
        visual, audio: [n, D] unit vectors of this rank's clips.
        classes: [n] their classes.

    Returns:
        For both directions, video to audio (`v2a_`) and audio to video (`a2v_`): `recall@1`, `@5`, `@10` and `map` (mean average precision); and
        `rsum`, the sum of all recalls in percent, as the literature gives it. Empty without clips.
    """
    first = all_gather_rows(torch.tensor([len(visual)], device=visual.device))[: get_rank()].sum()
    every = {"visual": all_gather_variable_rows(visual.float()), "audio": all_gather_variable_rows(audio.float())}
    kinds = all_gather_variable_rows(classes)
    if not len(kinds):
        return {}
    found: dict[str, float] = {}
    block = max(1, _SCORES // len(kinds))
    for direction, queries, answering in (("v2a", visual, "audio"), ("a2v", audio, "visual")):
        totals = torch.zeros(len(RECALLED) + 1, dtype=torch.float64, device=visual.device)
        for start in range(0, len(queries), block):
            some = queries[start : start + block].float()
            itself = torch.arange(start, start + len(some), device=some.device) + first
            order = (some @ every[answering].T).sort(dim=1, descending=True, stable=True).indices
            place = (order == itself[:, None]).float().argmax(1)
            relevant = (kinds[order] == kinds[itself][:, None]).double()
            precision = relevant.cumsum(1) / torch.arange(1, len(kinds) + 1, device=some.device)
            totals[:-1] += torch.stack([(place < k).sum() for k in RECALLED])
            totals[-1] += ((precision * relevant).sum(1) / relevant.sum(1)).sum()
        shares = (all_reduce_sum_(totals) / len(kinds)).tolist()
        found |= {f"{direction}_recall@{k}": share for k, share in zip(RECALLED, shares, strict=False)}
        found[f"{direction}_map"] = shares[-1]
    found["rsum"] = 100 * sum(value for key, value in found.items() if "recall" in key)
    return found
