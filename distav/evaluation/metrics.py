"""Metrics of labels, correspondence and features: tensors and arrays in, numbers out."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_rows, all_gather_variable_rows, all_reduce_sum_, get_rank

RECALL_RANKS = (1, 5, 10)
_BLOCK_SCORES = 2**24
"""Retrieval scores that are ranked at a time."""


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve, where ties count half.

    It is the probability that a positive has a higher score than a negative; NaN without positives or negatives.
    """
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    # Imported late, since importing scipy.stats takes a second.
    from scipy.stats import rankdata

    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def label_accuracy(given: np.ndarray, corrected: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return the accuracy of labels before and after correction, and the effect on wrong and right labels.

    Args:
        given, corrected, true: [N] class numbers.

    Returns:
        Fractions: `given` and `corrected`, right labels of all; `wrong_labels_fixed` of the wrong given labels;
        `right_labels_broken` of the right given labels. None if there are no such labels.
    """
    wrong = given != true
    corrected_right = corrected == true
    return {
        "given": float((~wrong).mean()),
        "corrected": float(corrected_right.mean()),
        "wrong_labels_fixed": float(corrected_right[wrong].mean()) if wrong.any() else None,
        "right_labels_broken": float((~corrected_right[~wrong]).mean()) if (~wrong).any() else None,
    }


def expected_calibration_error(probs: np.ndarray, true: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over bins of equal width (Guo et al. 2017, equation 3).

    Args:
        probs: [N, C] class probabilities.
        true: [N] class numbers.
        bins: number of bins of the confidence.
    """
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == true
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    gap = np.abs(np.bincount(bin_of, right - confidence, minlength=bins))
    return float(gap[count > 0].sum() / len(true))


def class_scores(scores: Tensor, classes: Tensor) -> dict[str, float]:
    """Return the metrics of a classifier over all clips, as fractions.

    Args:
        scores: [n, C] probabilities or other scores of the classes.
        classes: [n] int64 classes of the clips.

    Returns:
        `top1` and `top5` (with more than five classes), accuracies; `balanced`, the mean recall, `f1_macro`, the mean
        F1 score, and `map`, the mean average precision, of the classes that have clips. Empty without clips.
    """
    present, num_classes = classes.unique(), scores.shape[1]
    if not len(present):
        return {}
    if num_classes == 1:  # Which torchmetrics does not accept.
        return dict.fromkeys(("top1", "balanced", "f1_macro", "map"), 1.0)
    # Imported late, since importing torchmetrics takes seconds.
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_average_precision,
        multiclass_f1_score,
    )

    ranks = [k for k in (1, 5) if k < num_classes]
    metrics = {f"top{k}": multiclass_accuracy(scores, classes, num_classes, "micro", k) for k in ranks}
    recalls = multiclass_accuracy(scores, classes, num_classes, "none")
    f1 = multiclass_f1_score(scores, classes, num_classes, "none")
    # In [0, 1], since torchmetrics takes other scores for logits and changes their order over the clips.
    low, high = scores.min(), scores.max()
    relative = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    precisions = multiclass_average_precision(relative, classes, num_classes, "none")
    for name, values in (("balanced", recalls), ("f1_macro", f1), ("map", precisions)):
        metrics[name] = torch.as_tensor(values)[present].mean()
    return {name: float(value) for name, value in metrics.items()}


NOISE_KINDS = ["right", "wrong label", "wrong pair", "both wrong"]
MISMATCH_THRESHOLD = 0.5
"""Pairs with a lower correspondence probability are predicted to be mismatched."""


def noise_kinds(wrong_label: np.ndarray, wrong_pair: np.ndarray) -> np.ndarray:
    """Return the index in `NOISE_KINDS` of each sample: [N] bool twice -> [N] int64."""
    return wrong_label.astype(np.int64) + 2 * wrong_pair


def confusion(target: np.ndarray, predicted: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    """Return a confusion matrix with the names of its rows and columns; rows are targets, columns predictions.

    Args:
        target, predicted: [N] int64 indices in `kinds`.
        kinds: names of rows and columns.
    """
    counts = np.zeros((len(kinds), len(kinds)), dtype=np.int64)
    np.add.at(counts, (target, predicted), 1)
    return {"kinds": kinds, "counts": counts.tolist()}


def retrieval(visual: Tensor, audio: Tensor, classes: Tensor) -> dict[str, float]:
    """Compute exact cross-modal retrieval metrics over the clips of all ranks.

    Keys are ranked by cosine similarity, and by index where it is equal. For recall, the key of the same clip is
    relevant; for average precision, all keys of the same class are.

    Args:
        visual, audio: [n, D] unit vectors of this rank's clips.
        classes: [n] their classes.

    Returns:
        For both directions, video to audio (`v2a_`) and audio to video (`a2v_`): `recall@1`, `@5`, `@10` and `map`
        (mean average precision) as fractions; and `rsum`, the sum of all recalls in percent, as in the literature.
        Empty without clips.
    """
    first = all_gather_rows(torch.tensor([len(visual)], device=visual.device))[: get_rank()].sum()
    visual_keys, audio_keys = all_gather_variable_rows(visual.float()), all_gather_variable_rows(audio.float())
    all_classes = all_gather_variable_rows(classes)
    if not len(all_classes):
        return {}
    metrics: dict[str, float] = {}
    for direction, queries, keys in (("v2a", visual, audio_keys), ("a2v", audio, visual_keys)):
        totals = _retrieval_totals(queries, keys, all_classes, first)
        *recalls, mean_precision = (all_reduce_sum_(totals) / len(all_classes)).tolist()
        metrics |= {f"{direction}_recall@{k}": recall for k, recall in zip(RECALL_RANKS, recalls, strict=True)}
        metrics[f"{direction}_map"] = mean_precision
    metrics["rsum"] = 100 * sum(value for key, value in metrics.items() if "recall" in key)
    return metrics


def _retrieval_totals(queries: Tensor, keys: Tensor, classes: Tensor, first: Tensor) -> Tensor:
    """Return sums over queries of the recalls and of average precision: [4] float64.

    Args:
        queries: [n, D] of this rank.
        keys: [N, D] of all ranks.
        classes: [N] classes of the keys.
        first: index in the keys of this rank's first clip.
    """
    totals = torch.zeros(len(RECALL_RANKS) + 1, dtype=torch.float64, device=queries.device)
    block = max(1, _BLOCK_SCORES // len(classes))
    for start in range(0, len(queries), block):
        rows = queries[start : start + block].float()
        own = torch.arange(start, start + len(rows), device=rows.device) + first
        order = (rows @ keys.T).sort(dim=1, descending=True, stable=True).indices
        rank_of_own = (order == own[:, None]).float().argmax(1)
        relevant = (classes[order] == classes[own][:, None]).double()
        precision = relevant.cumsum(1) / torch.arange(1, len(classes) + 1, device=rows.device)
        totals[:-1] += torch.stack([(rank_of_own < k).sum() for k in RECALL_RANKS])
        totals[-1] += ((precision * relevant).sum(1) / relevant.sum(1)).sum()
    return totals
