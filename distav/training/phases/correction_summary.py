"""Summary, table and log lines of a label correction."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.data.annotations.labels import Labels, correction_table
from distav.data.files import write_table
from distav.distributed.collectives import all_gather_variable_rows, local_shard
from distav.drawing.figures import histogram
from distav.evaluation.metrics import (
    MISMATCH_THRESHOLD,
    NOISE_KINDS,
    auroc,
    confusion,
    expected_calibration_error,
    label_accuracy,
    noise_kinds,
)
from distav.noise.class_posterior import probability_of
from distav.noise.correction import Correction
from distav.training.run import Run

MIN_CHANGE_CONFIDENCE = 0.8
"""Mean confidence of the changed labels below which a correction counts as unreliable."""


@dataclass(frozen=True)
class CorrectionResult:
    """Result of a correction for the samples of all ranks.

    Attributes:
        corrected: [N] int64 classes after correction; see `distav.noise.class_posterior.corrected_labels`.
        change_odds: odds above which labels were changed.
        knn_labels: [N] int64 classes predicted by the held-out votes.
        confidence: [N] float32 probability of the corrected class.
        self_confidence: [N] float32 probability of the given class under held-out votes.
        correspondence: [N] float32 correspondence probability.
        calibration_errors: expected calibration errors of the class probabilities; empty without true labels.
    """

    corrected: np.ndarray
    change_odds: float
    knn_labels: np.ndarray
    confidence: np.ndarray
    self_confidence: np.ndarray
    correspondence: np.ndarray
    calibration_errors: dict[str, float]


def gather_result(run: Run, correction: Correction, min_change_odds: float) -> CorrectionResult:
    """Gather the result of a correction from all ranks; see `Correction.corrected_labels` for the odds."""
    labels = run.data.labels
    given = local_shard(torch.from_numpy(labels.given)).to(run.world.device)
    corrected = correction.corrected_labels(given, min_change_odds)
    errors = {}
    if labels.true is not None:
        errors = {
            "ece_held_out": calibration_error(correction.held_out, labels.true),
            "ece_posterior": calibration_error(correction.posterior, labels.true),
        }
    return CorrectionResult(
        corrected=_gather(corrected),
        change_odds=min_change_odds * correction.caution,
        knn_labels=_gather(correction.held_out.argmax(1)),
        confidence=_gather(probability_of(corrected, correction.posterior)),
        self_confidence=_gather(probability_of(given, correction.held_out)),
        correspondence=run.bank.gather_column("correspondence").cpu().numpy(),
        calibration_errors=errors,
    )


def _gather(values: Tensor) -> np.ndarray:
    return all_gather_variable_rows(values).cpu().numpy()


def build_summary(name: str, labels: Labels, correction: Correction, result: CorrectionResult) -> dict[str, Any]:
    """Return the entry of a correction in report.json, with metrics against the ground truth of the dataset."""
    class_rates = zip(labels.classes, correction.class_rates, strict=True) if correction.has_signal else ()
    changed = result.corrected != labels.given
    summary: dict[str, Any] = {
        "phase": name,
        "log_likelihood_gain": round(correction.log_likelihood_gain, 1),
        "selected_votes": correction.selected_votes,
        "change_odds": round(result.change_odds, 3),
        "changed_fraction": float(changed.mean()),
        "changed_confidence": float(result.confidence[changed].mean()) if changed.any() else None,
        "label_noise_rate": correction.label_rate.as_dict(),
        "label_noise_rate_by_class": {label: rate.as_dict() for label, rate in class_rates},
        "pair_mismatch_rate": correction.pair_rate.as_dict(),
        "visual_owner": round(correction.visual_owner, 4),
    }
    if labels.true is not None:
        accuracy = label_accuracy(labels.given, result.corrected, labels.true)
        summary["label_accuracy"] = accuracy | result.calibration_errors
    mismatched = labels.mismatched()
    if mismatched is not None and mismatched.any() and labels.pair_id is not None:
        swapped = labels.pair_id != np.arange(len(mismatched))
        summary["pair_auroc"] = {
            "other_class": auroc(result.correspondence, ~mismatched),
            "swapped": auroc(result.correspondence, ~swapped),
        }
        if labels.true is not None:
            summary["noise_confusion"] = confusion(*_noise_kinds(labels, mismatched, result), NOISE_KINDS)
    if warning := correction_warning(summary):
        summary["warning"] = warning
    return summary


def correction_warning(summary: dict[str, Any], column: str = "confidence") -> str | None:
    """Return what makes a correction unreliable and what to do, or None.

    Args:
        summary: entry of the correction in report.json.
        column: column of the labels table with the probabilities of the labels.
    """
    confidence, accuracy = summary["changed_confidence"], summary.get("label_accuracy")
    findings: list[str] = []
    if accuracy and accuracy["corrected"] < accuracy["given"]:
        findings.append(
            f"the corrected labels are less accurate ({accuracy['corrected']:.1%}) than the given labels "
            f"({accuracy['given']:.1%})"
        )
    if confidence is not None and confidence < MIN_CHANGE_CONFIDENCE:
        findings.append(
            f"the changed labels have a mean confidence of {confidence:.0%}: about {1 - confidence:.0%} of the changes "
            "are probably wrong"
        )
    if not findings:
        return None
    return (
        f"{'; '.join(findings)}. The features do not separate the classes well enough. Train the phases before this "
        f"correction for more epochs; to use its labels, select by the column `{column}`."
    )


def _noise_kinds(labels: Labels, mismatched: np.ndarray, result: CorrectionResult) -> tuple[np.ndarray, np.ndarray]:
    """Return the true and the predicted noise kind of each sample: [N] int64 twice."""
    true = noise_kinds(labels.given != labels.true, mismatched)
    return true, noise_kinds(result.corrected != labels.given, result.correspondence < MISMATCH_THRESHOLD)


def write_labels_table(run: Run, name: str, result: CorrectionResult) -> None:
    """Write `labels/<phase>.parquet`: the corrected labels and the scores of all samples."""
    table = correction_table(
        run.data.train,
        run.data.labels,
        result.corrected,
        result.knn_labels,
        result.confidence,
        result.self_confidence,
        result.correspondence,
    )
    (run.folder / "labels").mkdir(exist_ok=True)
    write_table(run.folder / "labels" / f"{name}.parquet", table)


def log_correction(
    run: Run, correction: Correction, result: CorrectionResult, summary: dict[str, Any], min_gain: float
) -> None:
    """Log the metrics, confusion matrices and result of a correction.

    Args:
        run: the run.
        correction: result of this rank.
        result: result of all ranks.
        summary: result of `build_summary`.
        min_gain: log-likelihood gain below which labels are kept, in nats.
    """
    labels, step = run.data.labels, run.progress.total_steps
    metrics: dict[str, float | str] = {
        "phase": summary["phase"],
        "labels/changed_fraction": summary["changed_fraction"],
        "labels/noise_rate": correction.label_rate.estimate,
        "correspondence/mismatch_rate": correction.pair_rate.estimate,
    }
    accuracy = summary.get("label_accuracy", {})
    metrics |= {f"labels/{key}": value for key, value in accuracy.items() if value is not None}
    if "pair_auroc" in summary:
        metrics["correspondence/auroc"] = summary["pair_auroc"]["other_class"]
    run.logger.log_metrics(step, metrics)
    mismatched = labels.mismatched()
    if "noise_confusion" in summary and mismatched is not None:
        true, predicted = _noise_kinds(labels, mismatched, result)
        run.logger.confusion("noise/true_vs_predicted", true, predicted, NOISE_KINDS, step)
    run.logger.confusion("labels/given_vs_corrected", labels.given, result.corrected, labels.classes, step)
    if run.world.is_main:
        changed = result.corrected != labels.given
        log_confidence(run, summary["phase"], result.confidence, changed, "corrected label")
    run.logger.info(_log_line(summary, correction.has_signal, min_gain))
    if "warning" in summary and run.world.is_main:
        run.logger.warn(f"phase={summary['phase']} warning: {summary['warning']}")


def log_confidence(run: Run, phase: str, confidence: np.ndarray, changed: np.ndarray, what: str) -> None:
    """Log the distribution of confidences, and as an image with kept and changed labels apart.

    Args:
        run: the run.
        phase: name of the phase.
        confidence: [N] float32 probabilities.
        changed: [N] bool, labels that the correction changed.
        what: what the probabilities are of.
    """
    step = run.progress.total_steps
    run.logger.histogram("labels/confidence", torch.from_numpy(np.ascontiguousarray(confidence)), step)
    parts = {"kept": confidence[~changed], "changed": confidence[changed]}
    run.logger.image("labels/confidence", histogram(parts, f"{phase}: confidence", f"probability of the {what}"), step)


def _log_line(summary: dict[str, Any], has_signal: bool, min_gain: float) -> str:
    if not has_signal and not summary["selected_votes"]:
        return (
            f"phase={summary['phase']} keeps the given labels: a phase trained on them after a correction without "
            "label signal, so votes in its features would reproduce wrong labels. Train the phases before the first "
            "correction for more epochs."
        )
    if not has_signal:
        return (
            f"phase={summary['phase']} k-NN votes carry no label signal (log-likelihood gain "
            f"{summary['log_likelihood_gain']:.1f} nats, threshold {min_gain}); keeping the given labels. The next "
            "supervised phase will use generalized cross-entropy. The neighbors of a clip predict its label no better "
            "than the class frequencies do: train the phases before this correction for more epochs, or check that "
            "the classes can be recognized in these clips."
        )
    accuracy, rate = summary.get("label_accuracy"), summary["label_noise_rate"]
    improvement = f" (accuracy {accuracy['given']:.1%} -> {accuracy['corrected']:.1%})" if accuracy else ""
    return (
        f"phase={summary['phase']} changed {summary['changed_fraction']:.1%} of the labels{improvement}; "
        f"label noise rate {rate['estimate']:.0%} (95 % interval {rate['ci95_low']:.0%} to {rate['ci95_high']:.0%})"
    )


def calibration_error(probs: Tensor, true: np.ndarray) -> float:
    """Return the expected calibration error over all ranks; each rank sends its confidences rather than the table.

    Args:
        probs: [n, C] of this rank.
        true: [N] true classes of all ranks.
    """
    maxima, classes = probs.max(1)
    confidence, predicted = _gather(maxima), _gather(classes)
    two_classes = np.stack([confidence, np.zeros_like(confidence)], axis=1)
    return expected_calibration_error(two_classes, np.where(predicted == true, 0, 1))
