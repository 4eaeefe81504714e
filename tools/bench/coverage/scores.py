"""Scores of the estimates of a label correction against the truth.

- The label-noise rate is the fraction of given labels that differ from the class of the modality that owns the label.
  Labels of open-set samples are always wrong.
- The mismatch rate is the fraction of pairs whose modalities are of different classes: audio of another clip of the
  same class matches, and so does the own audio of an open-set sample.
- The label-noise rate of a class is the fraction of wrong labels among the samples that truly belong to it.
- A right label is broken if the correction changes it. If the posterior is right, the fraction of broken labels is
  expected to be its mean probability of the given label over the changed samples, divided by that over all samples.
- All rates are those of the drawn samples, not of the distribution that they were drawn from.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from distav.evaluation.metrics import auroc, expected_calibration_error
from distav.noise.noise_rate import RateEstimate
from tools.bench.coverage.correction import Estimates, run_correction
from tools.bench.coverage.generator import generate
from tools.bench.coverage.problem import CoverageData, CoverageProblem
from tools.bench.coverage.reference import classify

ROUNDING_TOLERANCE = 1e-9
REPORTED_PARAMETERS = (
    "pair_noise",
    "owner",
    "noise_peak",
    "zipf",
    "open_set_rate",
    "clips_per_source",
    "group_coupling",
    "outlier_rate",
)
"""Parameters of a problem that its scores include, besides sizes, label noise and separability."""


def score_problem(problem: CoverageProblem) -> dict[str, Any]:
    """Return the parameters and the scores of a problem."""
    parameters = {
        "name": problem.name,
        "family": problem.family,
        "label_noise": f"{problem.label_noise}:{problem.label_noise_rate:.3f}",
        "visual_separability": problem.visual.separability,
        "audio_separability": problem.audio.separability,
        **{key: getattr(problem, key) for key in REPORTED_PARAMETERS},
    }
    return rounded(parameters | score_data(generate(problem)))


def score_data(data: CoverageData) -> dict[str, Any]:
    """Correct the labels of samples with known truth, and return the scores and the CPU time in seconds."""
    visual, audio = classify(data.visual, data), classify(data.audio, data)
    started = time.process_time()
    estimates = run_correction(data)
    seconds = time.process_time() - started
    return {
        "num_samples": len(data.given),
        "num_classes": data.num_classes,
        "signal": visual.has_signal or audio.has_signal,
        "visual_accuracy": visual.accuracy,
        "audio_accuracy": audio.accuracy,
        "seconds": seconds,
        **score(data, estimates),
    }


def score(data: CoverageData, estimates: Estimates) -> dict[str, Any]:
    """Return the scores of estimates; scores without a value, such as the AUROC without mismatched pairs, are None."""
    rows = np.arange(len(data.given))
    known = data.true < data.num_classes
    given_probs = estimates.posterior[rows, data.given].astype(np.float64)
    corrected = estimates.corrected
    changed, right = corrected != data.given, ~data.wrong
    expected_right = max(given_probs.sum(), 1e-9)
    ranking = auroc(estimates.correspondence, ~data.mismatched)
    return {
        "has_signal": bool(estimates.has_signal),
        "label_rate": _rate(estimates.label_rate, float(data.wrong.mean())),
        "pair_rate": _rate(estimates.pair_rate, float(data.mismatched.mean())),
        **_class_scores(data, estimates.class_rates if estimates.has_signal else ()),
        "broken": float(changed[right].mean()) if right.any() else 0.0,
        "broken_expected": float(given_probs[changed].sum() / expected_right),
        "wrong_expected": float(1 - given_probs.mean()),
        "labels_right_before": float(right[known].mean()),
        "labels_right_after": float((corrected == data.true)[known].mean()),
        "visual_right_after": float((corrected == data.visual_class)[known].mean()),
        "audio_right_after": float((estimates.audio_posterior.argmax(1) == data.audio_class)[known].mean()),
        "ece": expected_calibration_error(estimates.posterior, data.true),
        "ece_held_out": expected_calibration_error(estimates.held_out, data.true),
        "correspondence_auroc": None if np.isnan(ranking) else ranking,
    }


def _rate(estimate: RateEstimate, true: float) -> dict[str, float | bool]:
    covered = estimate.ci95_low - ROUNDING_TOLERANCE <= true <= estimate.ci95_high + ROUNDING_TOLERANCE
    return {
        "true": true,
        "estimate": estimate.estimate,
        "ci95_low": estimate.ci95_low,
        "ci95_high": estimate.ci95_high,
        "covered": bool(covered),
    }


def _class_scores(data: CoverageData, estimates: Sequence[RateEstimate]) -> dict[str, float | None]:
    """Return the fraction of classes whose interval covers their rate, and the median width of the intervals."""
    rates = [data.class_rate(label) for label in range(len(estimates))]
    scored = [
        (_rate(estimate, rate), estimate.ci95_width)
        for estimate, rate in zip(estimates, rates, strict=True)
        if rate is not None
    ]
    if not scored:
        return {"class_coverage": None, "class_width": None}
    covered, widths = zip(*((rate["covered"], width) for rate, width in scored), strict=True)
    return {"class_coverage": float(np.mean(covered)), "class_width": float(np.median(widths))}


def rounded(values: Any) -> Any:
    """Return a JSON value with numbers rounded to five digits after the decimal point."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 5) if isinstance(values, float) else values
