"""Final report of a run: report.json and the printed summary."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.phases import EventParsingPhase, SupervisedPhase
from distav.console import format_entries
from distav.data.files import write_atomically
from distav.noise.noise_rate import MAX_INTERVAL_WIDTH
from distav.training import final_evaluation
from distav.training.classifier_fusion import fit_run_fusion
from distav.training.export import export
from distav.training.hyperparameters import hyperparameters
from distav.training.multi_label_evaluation import evaluate_multi_label_clips
from distav.training.multi_label_report import list_label_entries, list_noise_entries, list_test_entries
from distav.training.projector import log_projector
from distav.training.run import Run

_IMBALANCE_FACTOR = 2
"""Ratio of the largest to the smallest class from which the summary gives the balanced accuracy."""


def write_report(run: Run) -> None:
    """Fuse the classifiers, evaluate on the test split, export the network, write report.json and print the summary.

    All ranks call this.
    """
    parses_events = [isinstance(phase, EventParsingPhase) for phase in run.config.phases.values()]
    fusion = fit_run_fusion(run)
    if all(parses_events):
        test = None
    elif run.data.shards.multi_label:
        test = evaluate_multi_label_clips(run)
    else:
        test = final_evaluation.evaluate_clips(run, fusion)
    events = final_evaluation.evaluate_events(run) if any(parses_events) else None
    log_projector(run)
    weights = run.engine.full_state_dict()
    quarantined = run.quarantined_samples()
    if not run.world.is_main:
        return
    report = _training_figures(run)
    if fusion is not None:
        report["fusion"] = asdict(fusion)
    scalars: dict[str, float] = {}
    if test is not None:
        report["test"] = test
        scalars |= {f"test/{name}": value for name, value in test.items() if name != "by_class"}
    if events is not None:
        report["events"] = events
        scalars |= {
            f"events/{level}_{name}": events[level][name] for level in ("segment", "event") for name in events[level]
        }
    if scalars:
        run.logger.log_metrics(run.progress.total_steps, scalars)
    if run.logger.tensorboard:
        settings = hyperparameters(run.config)
        run.logger.tensorboard.log_hyperparameters(settings, scalars | _correction_scalars(report))
    keys = run.data.train.keys
    report["quarantined_samples"] = [
        {"id": sample, "key": str(keys[sample]), "reason": reason} for sample, reason in quarantined.items()
    ]
    export(run, weights, report, fusion)
    write_atomically(run.folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    run.logger.report(report)
    has_signal = run.state.correction is not None and run.state.correction.has_signal
    run.logger.info(format_summary(report, run.folder, len(run.data.shards.classes), has_signal))


def _training_figures(run: Run) -> dict[str, Any]:
    figures = run.state.report
    report: dict[str, Any] = {"samples": len(run.data.train)}
    if any(isinstance(phase, SupervisedPhase) for phase in run.config.phases.values()):
        classes, data = run.data.shards.classes, run.data
        if data.shards.multi_label:
            counts = data.multi_labels.given.sum(0)
        else:
            counts = np.bincount(data.labels.given, minlength=len(classes))
        report["given_labels_by_class"] = dict(zip(classes, counts.tolist(), strict=True))
    report |= {
        "phases": figures.phases,
        "checkpointing": asdict(figures.checkpointing),
    }
    if figures.skipped_steps:
        report["skipped_steps"] = figures.skipped_steps
    if figures.correspondence:
        report["correspondence"] = figures.correspondence
    if figures.corrections:
        last = figures.corrections[-1]
        if "label_accuracy" in last:
            report["label_accuracy"] = last["label_accuracy"]
        if "pair_auroc" in last:
            report["correspondence_auroc"] = last["pair_auroc"]["other_class"]
        report["corrections"] = figures.corrections
    return report


def _correction_scalars(report: dict[str, Any]) -> dict[str, float]:
    """Return scalars of the last label correction, by the keys that it was logged with."""
    if not report.get("corrections"):
        return {}
    last = report["corrections"][-1]
    values = {"changed_fraction": last["changed_fraction"], **last.get("label_accuracy", {})}
    return {f"labels/{key}": value for key, value in values.items() if value is not None}


def format_summary(report: dict[str, Any], folder: Path, num_classes: int, has_signal: bool) -> str:
    """Return the summary that is printed at the end of a run.

    Args:
        report: content of report.json.
        folder: the run directory.
        num_classes: number of classes of the dataset.
        has_signal: whether the last label correction found a signal in its votes; false without a correction.
    """
    seconds = sum(phase["seconds"] for phase in report["phases"])
    corrections = report.get("corrections", [])
    entries = [*_label_entries(report), *_test_entries(report, num_classes)]
    if corrections:
        entries += _noise_entries(corrections[-1], has_signal)
    if quarantined := len(report["quarantined_samples"]):
        clips = "1 clip" if quarantined == 1 else f"{quarantined} clips"
        entries.append(("Quarantine", f"{clips} could not be read or decoded"))
    if corrections:
        entries.append(("Label file", f"{folder / 'labels' / corrections[-1]['phase']}.parquet"))
    entries += [
        ("Network", f"{folder / 'export'}"),
        ("Metrics", f"tensorboard --logdir {folder}"),
        ("Report", f"{folder / 'report.json'}"),
    ]
    return "\n" + format_entries(f"Done: {report['samples']} training clips, {seconds:.0f} s of training.", entries)


def _label_entries(report: dict[str, Any]) -> list[tuple[str, str]]:
    corrections = report.get("corrections")
    if corrections and corrections[-1].get("multi_label"):
        return list_label_entries(corrections[-1])
    entries = []
    if "label_accuracy" in report:
        accuracy = report["label_accuracy"]
        text = (
            f"accuracy {_percent(accuracy['given'])} -> {_percent(accuracy['corrected'])} "
            f"({_percent(accuracy['wrong_labels_fixed'])} of wrong labels fixed, "
            f"{_percent(accuracy['right_labels_broken'])} of right labels broken)"
        )
        entries.append(("Labels", text))
    elif report.get("corrections"):
        changed = report["corrections"][-1]["changed_fraction"]
        entries.append(("Labels", f"{_percent(changed)} of the given labels changed by correction"))
    if "correspondence_auroc" in report:
        entries.append(("Pairs", f"mismatched-audio detection AUROC {report['correspondence_auroc']:.3f}"))
    return entries


def _test_entries(report: dict[str, Any], num_classes: int) -> list[tuple[str, str]]:
    test = report.get("test") or {}
    entries = list_test_entries(test)
    if "top1" in test:
        given = report.get("corrections") and "label_accuracy" not in report
        labels = "; by the given labels, which are not corrected" if given else ""
        entries.append(("Test", f"top-1 {_accuracies(test, 'top1')}; chance {_percent(1 / num_classes)}{labels}"))
        entries += _class_entries(report)
    if "rsum" in test:
        text = (
            f"mAP video-to-audio {_percent(test['v2a_map'])}, audio-to-video {_percent(test['a2v_map'])}; "
            f"rSum {test['rsum']:.1f} / 600"
        )
        entries.append(("Retrieval", text))
    if "events" in report:
        segment, event = report["events"]["segment"], report["events"]["event"]
        text = (
            f"segment-level F1 audio {segment['audio']:.1f}, visual {segment['visual']:.1f}, Type@AV "
            f"{segment['type']:.1f}, Event@AV {segment['event']:.1f}; event-level F1 Type@AV {event['type']:.1f}, "
            f"Event@AV {event['event']:.1f}"
        )
        entries.append(("Events", text))
    return entries


def _accuracies(test: dict[str, Any], metric: str) -> str:
    """Return the values of a metric for the classifiers that have test clips."""
    names = {metric: "video and audio", f"{metric}_visual": "video only", f"{metric}_audio": "audio only"}
    return ", ".join(f"{_percent(test[key])} ({name})" for key, name in names.items() if key in test)


def _class_entries(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the entry on balanced accuracy; none if the classes have similar numbers of training and test clips."""
    test, train_counts = report["test"], report["given_labels_by_class"].values()
    test_counts = [scores["clips"] for scores in test["by_class"]["both"].values() if scores["clips"]]
    if not any(max(counts) >= _IMBALANCE_FACTOR * min(counts) for counts in (train_counts, test_counts)):
        return []
    sizes = f"{min(train_counts)} to {max(train_counts)} training clips per class"
    return [("Classes", f"balanced accuracy {_accuracies(test, 'balanced_accuracy')}; {sizes}")]


def _noise_entries(correction: dict[str, Any], has_signal: bool) -> list[tuple[str, str]]:
    if correction.get("multi_label"):
        return list_noise_entries(correction)
    if not has_signal:
        text = "not estimated: k-NN votes carry no label signal, the given labels are kept; train for more epochs"
        return [("Noise", text)]
    entries = []
    for name, key in (("label noise rate", "label_noise_rate"), ("pair mismatch rate", "pair_mismatch_rate")):
        rate = correction[key]
        low, high = rate["ci95_low"], rate["ci95_high"]
        estimate = "not identified" if high - low > MAX_INTERVAL_WIDTH else _percent(rate["estimate"])
        entries.append(("Noise", f"{name} {estimate} (95 % interval {_percent(low)} to {_percent(high)})"))
    if "warning" in correction:
        entries.append(("Warning", correction["warning"]))
    return entries


def _percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.1f} %"
