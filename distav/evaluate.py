"""Scores: top-1 on a test split, accuracy of corrected labels, detection of mismatched pairs."""

import numpy as np
import torch
from scipy.stats import rankdata

from distav.data.loader import Loader
from distav.data.order import owned_batches
from distav.run import Run
from distav.world import sum_


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
        Shares: `given` and `corrected` right of all; `flipped_recovered` of the wrong given ones; `clean_damaged` of
        the right given ones. None where there are no such labels.
    """
    wrong = given != true
    right_now = corrected == true
    return {
        "given": float((~wrong).mean()),
        "corrected": float(right_now.mean()),
        "flipped_recovered": float(right_now[wrong].mean()) if wrong.any() else None,
        "clean_damaged": float((~right_now[~wrong]).mean()) if (~wrong).any() else None,
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


def test_accuracy(run: Run) -> dict[str, float] | None:
    """Return top-1 on the test split by both modalities and by each alone; None without a test split."""
    split, labels = run.data.test, run.data.test_labels
    if split is None or labels is None:
        return None
    world, settings = run.world, run.settings
    truth = torch.from_numpy(labels.given if labels.true is None else labels.true).to(world.device)
    loader = Loader(split, settings.data, None, settings.run.seed, run.micro_batch, world.device)
    batches = owned_batches(len(split), run.micro_batch, world.rank, world.num_ranks)
    hits = torch.zeros(4, device=world.device)
    run.engine.train(False)
    try:
        with torch.no_grad():
            for batch in loader.batches((ids, 0) for ids in batches):
                outputs = run.engine(batch)
                for number, name in enumerate(("logits", "visual_logits", "audio_logits")):
                    right = outputs[name].argmax(1) == truth[batch.ids]
                    hits[number] += (right & batch.valid).sum()
                hits[3] += batch.valid.sum()
    finally:
        loader.close()
        run.engine.train()
    both, visual, audio, count = sum_(hits).tolist()
    count = max(1.0, count)
    return {"top1": both / count, "top1_visual": visual / count, "top1_audio": audio / count}
