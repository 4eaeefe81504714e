"""Label correction phase on a multi-label dataset: corrects the label lists of all clips with k-NN votes per class."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import LabelCorrectionPhase
from distav.console import show_progress
from distav.data.annotations.multi_labels import MultiLabels, multi_label_correction_table
from distav.data.files import write_table
from distav.distributed.collectives import all_gather_variable_rows
from distav.evaluation.multi_label_metrics import label_list_accuracy
from distav.noise.multi_label_correction import PRESENT, ListCorrection, correct_label_lists, identity_correction
from distav.noise.multi_label_votes import ListVoteSearch
from distav.training.feature_extraction import extract_features
from distav.training.phases.correction_summary import correction_warning, log_confidence
from distav.training.run import Run
from distav.training.run_state import CorrectionState


@dataclass(frozen=True)
class ListResult:
    """Result of a correction for the samples of all ranks.

    Attributes:
        held_out, posterior: [N, C] float32 probabilities, see `ListCorrection`.
        corrected: [N, C] bool.
    """

    held_out: np.ndarray
    posterior: np.ndarray
    corrected: np.ndarray


def run_multi_label_correction(run: Run, name: str, config: LabelCorrectionPhase) -> None:
    """Correct the label lists, store the result in the memory bank, and write the table `labels/<phase>.parquet`."""
    correction = _correct(run, name, config)
    run.bank.store_column("held_out", correction.held_out)
    run.bank.store_column("posterior", correction.posterior)
    state = run.state.correction or CorrectionState(correction.has_signal)
    state.has_signal = correction.has_signal
    if state.label_rate_logits is None and correction.has_signal:
        state.label_rate_logits = correction.rate_logits.tolist()
    run.state.correction = state
    held_out, posterior = (_gather(probs) for probs in (correction.held_out, correction.posterior))
    result = ListResult(held_out, posterior, posterior > PRESENT)
    labels = run.data.multi_labels
    summary = build_list_summary(name, labels, correction, result)
    run.state.report.corrections.append(summary)
    if run.world.is_main:
        table = multi_label_correction_table(run.data.train, labels, result.corrected, held_out, posterior)
        (run.folder / "labels").mkdir(exist_ok=True)
        write_table(run.folder / "labels" / f"{name}.parquet", table)
    _log(run, summary, result, config.min_log_likelihood_gain)


def _gather(values: Tensor) -> np.ndarray:
    return all_gather_variable_rows(values).cpu().numpy()


def _correct(run: Run, name: str, config: LabelCorrectionPhase) -> ListCorrection:
    """Extract the features and correct the lists; they are kept if the features only reproduce the given labels."""
    previous, device = run.state.correction, run.world.device
    given = torch.from_numpy(run.data.multi_labels.given).to(device)
    if run.state.given_labels_learned:
        if previous is not None and not previous.has_signal:
            return identity_correction(given)
        if (previous is None or previous.label_rate_logits is None) and run.world.is_main:
            run.logger.warn(
                f"phase={name} the features were trained on the given labels: their votes reproduce wrong labels, and "
                "the noise rates are underestimated. Add a label_correction phase before the first supervised phase on "
                "given labels."
            )
    spaces, present = extract_features(run)
    run.enforce_quarantine_limit()
    earlier = previous.label_rate_logits if previous is not None else None
    search = ListVoteSearch(
        config.num_neighbors,
        config.vote_temperatures,
        config.whitening_powers,
        config.num_components,
        config.probes,
    )
    with show_progress(None, "clips", f"{name}: correcting labels"):
        return correct_label_lists(
            {space.name: (space.visual, space.audio) for space in spaces},
            given,
            torch.from_numpy(run.data.train.source_codes).to(device),
            {modality: all_gather_variable_rows(rows.float()) > 0 for modality, rows in present.items()},
            search,
            config.min_log_likelihood_gain,
            None if earlier is None else torch.tensor(earlier, dtype=torch.float64, device=device),
        )


def build_list_summary(
    name: str, labels: MultiLabels, correction: ListCorrection, result: ListResult
) -> dict[str, Any]:
    """Return the entry of a correction in report.json, with metrics against the true labels of the dataset.

    Args:
        name: name of the phase.
        labels: given and, if stored, true labels.
        correction: noise estimates.
        result: result of all ranks.
    """
    changed = result.corrected != labels.given
    confidence = np.maximum(result.posterior, 1 - result.posterior)
    summary: dict[str, Any] = {
        "phase": name,
        "multi_label": True,
        "log_likelihood_gain": round(correction.log_likelihood_gain, 1),
        "has_signal": correction.has_signal,
        "selected_votes": correction.selected_votes,
        "changed_fraction": float(changed.any(1).mean()),
        "added_labels": int((changed & result.corrected).sum()),
        "removed_labels": int((changed & labels.given).sum()),
        "changed_confidence": float(confidence[changed].mean()) if changed.any() else None,
        "missing_label_rate": correction.missing_rate.as_dict(),
        "wrong_label_rate": correction.wrong_rate.as_dict(),
    }
    for key, rates in (
        ("missing_label_rate_by_class", correction.class_missing_rates),
        ("wrong_label_rate_by_class", correction.class_wrong_rates),
    ):
        by_class = zip(labels.classes, rates, strict=True) if correction.has_signal else ()
        summary[key] = {label: rate.as_dict() for label, rate in by_class}
    if labels.true is not None:
        summary["label_accuracy"] = label_list_accuracy(labels.given, result.corrected, labels.true)
    if warning := correction_warning(summary, column="posterior"):
        summary["warning"] = warning
    return summary


def _log(run: Run, summary: dict[str, Any], result: ListResult, min_gain: float) -> None:
    """Log metrics, the distributions of posteriors and of confidences of given and corrected labels, and one line."""
    step = run.progress.total_steps
    metrics: dict[str, float | str] = {
        "phase": summary["phase"],
        "labels/changed_fraction": summary["changed_fraction"],
        "labels/missing_rate": summary["missing_label_rate"]["estimate"],
        "labels/wrong_rate": summary["wrong_label_rate"]["estimate"],
    }
    accuracy = summary.get("label_accuracy", {})
    metrics |= {f"labels/{key}": value for key, value in accuracy.items() if value is not None}
    run.logger.log_metrics(step, metrics)
    run.logger.histogram("labels/posterior", torch.from_numpy(result.posterior.reshape(-1)), step)
    if run.world.is_main:
        given = run.data.multi_labels.given
        rows = given | result.corrected
        confidence = np.where(result.corrected, result.posterior, 1 - result.posterior)
        changed = (given != result.corrected)[rows]
        log_confidence(run, summary["phase"], confidence[rows], changed, "presence or absence of a label")
    run.logger.info(_log_line(summary, min_gain))
    if "warning" in summary and run.world.is_main:
        run.logger.warn(f"phase={summary['phase']} warning: {summary['warning']}")


def _log_line(summary: dict[str, Any], min_gain: float) -> str:
    name = summary["phase"]
    if not summary["has_signal"] and not summary["selected_votes"]:
        return (
            f"phase={name} keeps the given labels: there are no votes, or a phase trained on the given labels after a "
            "correction without label signal. Train the phases before the first correction for more epochs."
        )
    if not summary["has_signal"]:
        return (
            f"phase={name} k-NN votes carry no label signal (log-likelihood gain {summary['log_likelihood_gain']:.1f} "
            f"nats, threshold {min_gain}); keeping the given labels. Train the phases before this correction for more "
            "epochs, or check that the classes can be recognized in these clips."
        )
    accuracy, texts = summary.get("label_accuracy"), []
    for rate_name, key in (("missing", "missing_label_rate"), ("wrong", "wrong_label_rate")):
        rate = summary[key]
        interval = f"95 % interval {rate['ci95_low']:.1%} to {rate['ci95_high']:.1%}"
        texts.append(f"{rate_name} label rate {rate['estimate']:.1%} ({interval})")
    improvement = f" (F1 {accuracy['f1_given']:.1%} -> {accuracy['f1_corrected']:.1%})" if accuracy else ""
    return (
        f"phase={name} added {summary['added_labels']} and removed {summary['removed_labels']} labels of "
        f"{summary['changed_fraction']:.1%} of the clips{improvement}; {', '.join(texts)}"
    )
