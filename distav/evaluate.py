"""Scores: top-1 and retrieval on a test split, accuracy of corrected labels, detection of mismatched pairs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from distav.data.format import Split
from distav.data.loader import Batch, Loader
from distav.data.order import owned_batches
from distav.parsing_scores import parsing_scores, segment_accuracy, told_events
from distav.phase_settings import SupervisedPhase
from distav.run import Run
from distav.world import gather_ragged_rows, gather_rows, rank, sum_

RECALLED = (1, 5, 10)
_LIKELY = 0.5
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


NOISE_KINDS = ["right", "wrong label", "wrong pair", "both wrong"]


def noise_kinds(wrong_label: np.ndarray, wrong_pair: np.ndarray) -> np.ndarray:
    """Return each sample's place in `NOISE_KINDS`: [N] bool twice -> [N] int64."""
    return wrong_label.astype(np.int64) + 2 * wrong_pair


def confusion(true: np.ndarray, told: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    """Return how often each kind was taken for each: rows are what is, columns what was told.

    Args:
        true, told: [N] int64 places in `kinds`.
        kinds: their names.
    """
    counts = np.zeros((len(kinds), len(kinds)), dtype=np.int64)
    np.add.at(counts, (true, told), 1)
    return {"kinds": kinds, "counts": counts.tolist()}


def test(run: Run) -> dict[str, Any] | None:
    """Score the network on the test split; None without one.

    Returns:
        What `retrieval` returns; and, where classifiers were trained, `top1` by both modalities, `top1_visual` and
        `top1_audio` by each alone.
    """
    split, labels = run.data.test, run.data.test_labels
    if split is None or labels is None:
        return None
    device, settings = run.world.device, run.settings
    truth = torch.from_numpy(labels.given if labels.true is None else labels.true).to(device)
    hits = torch.zeros(4, device=device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, outputs in _outputs(run, split):
        valid = batch.valid
        for number, name in enumerate(("logits", "visual_logits", "audio_logits")):
            right = outputs[name].argmax(1) == truth[batch.ids]
            hits[number] += (right & valid).sum()
        hits[3] += valid.sum()
        parts.append((outputs["visual"][valid], outputs["audio"][valid], truth[batch.ids[valid]]))
    both, visual, audio, count = sum_(hits).tolist()
    shares = {}
    if any(isinstance(phase, SupervisedPhase) for phase in settings.phases.values()):
        count = max(1.0, count)
        shares = {"top1": both / count, "top1_visual": visual / count, "top1_audio": audio / count}
    return shares | retrieval(*(torch.cat(each) for each in zip(*parts, strict=True)))


def test_parsing(run: Run) -> dict[str, Any] | None:
    """Score the event parser on the test split; None without one, or where nobody told its events.

    A class counts in a segment where its probability there and in the whole clip are 0.5 or more (LLP's rule).

    Returns:
        What `parsing_scores` returns; and, where a clip has one event, `segment_accuracy` (AVE).
    """
    split, known = run.data.test, run.data.test_events
    if split is None or known is None or known.events is None:
        return None
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, outputs in _outputs(run, split, parse=True):
        shares = outputs["segments"].float().sigmoid()
        parts.append((batch.ids[batch.valid], shares[batch.valid], outputs["video"].float()[batch.valid]))
    ids, shares, video = (gather_ragged_rows(torch.cat(each)).cpu().numpy() for each in zip(*parts, strict=True))
    true = known.events[ids]
    told = (shares >= _LIKELY) & (video >= _LIKELY)[:, None, None]
    found: dict[str, Any] = {**parsing_scores(told, true)}
    if not run.data.shards.several_labels:
        happens = told_events(true[:, 0], true[:, 1])
        found["segment_accuracy"] = segment_accuracy(told_events(shares[:, 0], shares[:, 1]), happens)
    return found


def _outputs(run: Run, split: Split, **how: bool) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Yield this rank's batches of a split and what the network gives for them, in evaluation mode."""
    world, settings = run.world, run.settings
    loader = Loader(split, settings.data, None, settings.run.seed, run.micro_batch, world.device)
    plan = owned_batches(len(split), run.micro_batch, world.rank, world.num_ranks)
    run.engine.train(False)
    try:
        with torch.no_grad():
            for batch in loader.batches((ids, 0) for ids in plan):
                yield batch, run.engine(batch, **how)
    finally:
        loader.close()
        run.engine.train()


def retrieval(visual: Tensor, audio: Tensor, classes: Tensor) -> dict[str, float]:
    """Return how well pictures find sounds among all, and sounds pictures; exact, every rank asks for its own part.

    Keys are ranked by cosine, equal ones by their place. Recalls are for the one sound, or picture, of the same clip;
    average precision is for all of the same class.

    Args:
        visual, audio: [n, D] unit vectors of this rank's clips.
        classes: [n] their classes.

    Returns:
        For both directions, named by what asks: `recall_at_1`, `_5`, `_10` and `map` (mean average precision); and
        `rsum`, the sum of all recalls in percent, as the literature gives it. Empty without clips.
    """
    first = gather_rows(torch.tensor([len(visual)], device=visual.device))[: rank()].sum()
    every = {"visual": gather_ragged_rows(visual.float()), "audio": gather_ragged_rows(audio.float())}
    kinds = gather_ragged_rows(classes)
    if not len(kinds):
        return {}
    found: dict[str, float] = {}
    block = max(1, _SCORES // len(kinds))
    for asking, queries, answering in (("visual", visual, "audio"), ("audio", audio, "visual")):
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
        shares = (sum_(totals) / len(kinds)).tolist()
        found |= {f"{asking}_recall_at_{k}": share for k, share in zip(RECALLED, shares, strict=False)}
        found[f"{asking}_map"] = shares[-1]
    found["rsum"] = 100 * sum(value for key, value in found.items() if "recall" in key)
    return found
