"""Summary, table and log lines of a label correction."""

import numpy as np
import torch
from torch import Tensor

from distav.data.annotations.labels import correction_table
from distav.data.files import write_table
from distav.distributed.collectives import all_gather_variable_rows, shard_range
from distav.evaluation.metrics import (
    NOISE_KINDS,
    auroc,
    confusion,
    expected_calibration_error,
    label_accuracy,
    noise_kinds,
)
from distav.noise.label_correction import Correction
from distav.training.run import Run


def summarize_correction(run: Run, name: str, found: Correction) -> None:
    """Write the table and tell what was found, beside the truth where the set knows it."""
    labels, split = run.data.labels, run.data.train
    own = shard_range(len(split))
    given = torch.from_numpy(labels.given).to(run.world.device)[own.start : own.stop, None]
    corrected = all_gather_variable_rows(found.posterior.argmax(1)).cpu().numpy()
    voted = all_gather_variable_rows(found.held_out.argmax(1)).cpu().numpy()
    confidence = all_gather_variable_rows(found.posterior.amax(1)).cpu().numpy()
    agreement = all_gather_variable_rows(found.held_out.gather(1, given).squeeze(1)).cpu().numpy()
    correspondence = run.bank.gather_column("correspondence").cpu().numpy()
    step, changed = run.progress.total_steps, float((corrected != labels.given).mean())
    by_class = zip(labels.classes, found.class_rates, strict=True) if found.has_signal else ()
    summary = {
        "phase": name,
        "log_likelihood_gain": round(found.log_likelihood_gain, 1),
        "selected_votes": found.selected_votes,
        "changed_fraction": changed,
        "label_noise_rate": found.label_rate.as_dict(),
        "label_noise_rate_by_class": {each: rate.as_dict() for each, rate in by_class},
        "pair_mismatch_rate": found.pair_rate.as_dict(),
    }
    record: dict[str, float | str] = {
        "phase": name,
        "labels/changed_fraction": changed,
        "labels/noise_rate": found.label_rate.estimate,
        "correspondence/mismatch_rate": found.pair_rate.estimate,
    }
    told = ""
    if labels.true is not None:
        accuracy = label_accuracy(labels.given, corrected, labels.true)
        accuracy |= {
            f"ece_{each}": calibration_error(getattr(found, each), labels.true) for each in ("held_out", "posterior")
        }
        record |= {f"labels/{key}": value for key, value in accuracy.items() if value is not None}
        summary["label_accuracy"] = accuracy
        right = [100 * float((each == labels.true).mean()) for each in (corrected, labels.given)]
        told = f", right for {right[0]:.1f} % (given: {right[1]:.1f} %)"
    wrong = labels.mismatched()
    if wrong is not None and wrong.any() and labels.pair_id is not None:
        swapped = labels.pair_id != np.arange(len(split))
        record["correspondence/auroc"] = auroc(correspondence, ~wrong)
        summary["pair_auroc"] = {
            "other_class": auroc(correspondence, ~wrong),
            "swapped": auroc(correspondence, ~swapped),
        }
        if labels.true is not None:
            kinds = noise_kinds(labels.given != labels.true, wrong)
            told_kinds = noise_kinds(corrected != labels.given, correspondence < 0.5)
            summary["noise_confusion"] = confusion(kinds, told_kinds, NOISE_KINDS)
            run.logger.confusion("noise/true_vs_predicted", kinds, told_kinds, NOISE_KINDS, step)
    run.state.report.corrections.append(summary)
    if run.world.is_main:
        table = correction_table(split, labels, corrected, voted, confidence, agreement, correspondence)
        (run.folder / "labels").mkdir(exist_ok=True)
        write_table(run.folder / "labels" / f"{name}.parquet", table)
    run.logger.log_metrics(step, record)
    run.logger.confusion("labels/given_vs_corrected", labels.given, corrected, labels.classes, step)
    run.logger.histogram("labels/confidence", torch.from_numpy(np.ascontiguousarray(confidence)), step)
    noise = "label noise {estimate:.0%} ({ci95_low:.0%} to {ci95_high:.0%})".format(**found.label_rate.as_dict())
    if found.has_signal:
        share = f"{100 * changed:.1f} % of clips"
        run.logger.info(f"phase={name} corrected labels differ from the given ones for {share}{told}; {noise}")
    else:
        run.logger.info(
            f"phase={name} neighbours say nothing of the labels ({found.log_likelihood_gain:.1f} nats over all clips), so the given "
            "ones stay, and the next training takes them with a loss that bears wrong ones"
        )


def calibration_error(shares: Tensor, true: np.ndarray) -> float:
    """Return the calibration error over all ranks, of which each sends its largest shares and not whole rows.

    Args:
        shares: [n, C] of this rank.
        true: [N] class numbers of all.
    """
    confidence, told = (all_gather_variable_rows(each).cpu().numpy() for each in shares.max(1))
    largest_first = np.stack([confidence, np.zeros_like(confidence)], axis=1)
    return expected_calibration_error(largest_first, np.where(told == true, 0, 1))
