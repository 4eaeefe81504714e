"""What a run comes to: report.json, and the same in words."""

import json
from dataclasses import asdict
from typing import Any

from distav.config.phases import EventParsingPhase
from distav.data.files import write_atomically
from distav.training import final_evaluation
from distav.training.export import export
from distav.training.run import Run

_KNOWS_NOTHING = 0.5
"""Width of an interval for a rate that tells nothing of it."""


def write_report(run: Run) -> None:
    """Test, export, write report.json and print what it says."""
    parses = [isinstance(phase, EventParsingPhase) for phase in run.settings.phases.values()]
    test = None if all(parses) else final_evaluation.test(run)
    events = final_evaluation.test_parsing(run) if any(parses) else None
    state = run.engine.full_state_dict()
    bad = run.quarantined_samples()
    if not run.world.is_main:
        return
    keys, figures = run.data.train.keys, run.state.report
    report: dict[str, Any] = {
        "samples": len(run.data.train),
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
    if test is not None:
        report["test"] = test
        run.logger.log_metrics(run.progress.total_steps, {f"test/{key}": value for key, value in test.items()})
    if events is not None:
        report["events"] = events
        flat = {
            f"events/{level}_{key}": value for level in ("segment", "event") for key, value in events[level].items()
        }
        run.logger.log_metrics(run.progress.total_steps, flat)
    report["skipped_samples"] = [{"id": each, "key": str(keys[each]), "reason": why} for each, why in bad.items()]
    export(run, state, report)
    write_atomically(run.folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    run.logger.info(format_summary(run, report))


def format_summary(run: Run, report: dict[str, Any]) -> str:
    """Return the report as a newcomer would want to be told it."""
    seconds = sum(each["seconds"] for each in report["phases"])
    lines = ["", f"Done: {report['samples']} training clips, {seconds:.0f} s of training."]
    accuracy = report.get("label_accuracy")
    if accuracy:
        lines.append(
            f"  Labels:  {_percent(accuracy['given'])} of the given training labels were right; after correction "
            f"{_percent(accuracy['corrected'])} are."
        )
        lines.append(
            f"           Of the wrong ones {_percent(accuracy['wrong_labels_fixed'])} were set right; of the right ones "
            f"{_percent(accuracy['right_labels_broken'])} were spoilt."
        )
    elif run.state.report.corrections:
        lines.append(
            f"  Labels:  the correction disagrees with {_percent(run.state.report.corrections[-1]['changed_fraction'])} of the given labels."
        )
    if "correspondence_auroc" in report:
        lines.append(
            "  Pairs:   clips whose sound is foreign are told from the others with AUROC "
            f"{report['correspondence_auroc']:.3f} (1 is perfect, 0.5 is chance)."
        )
    test = report.get("test")
    if test and "top1" in test:
        chance = 1 / len(run.data.shards.classes)
        lines.append(
            f"  Test:    {_percent(test['top1'])} of clean test clips named rightly by picture and sound together, "
            f"{_percent(test['top1_visual'])} by picture alone, {_percent(test['top1_audio'])} by sound alone "
            f"(chance: {_percent(chance)})."
        )
    if test and "rsum" in test:
        lines.append(
            f"  Search:  pictures find sounds of their class with a mean average precision of "
            f"{_percent(test['v2a_map'])}, sounds pictures with {_percent(test['a2v_map'])}; rSum "
            f"{test['rsum']:.1f} of 600."
        )
    if "events" in report:
        seconds, whole = report["events"]["segment"], report["events"]["event"]
        lines.append(
            f"  Events:  second by second {seconds['audio']:.1f} of 100 for what is heard, {seconds['visual']:.1f} for "
            f"what is seen, Type@AV {seconds['type']:.1f}, Event@AV {seconds['event']:.1f}; as whole events Type@AV "
            f"{whole['type']:.1f}, Event@AV {whole['event']:.1f}."
        )
    if run.state.report.corrections:
        last = run.state.report.corrections[-1]
        known = (
            (("labels", "label_noise_rate"), ("pairs", "pair_mismatch_rate"))
            if run.state.correction and run.state.correction.has_signal
            else ()
        )
        if not known:
            lines.append("  Noise:   not known; neighbours say nothing of the labels, so these stay as given.")
        for what, key in known:
            low, high = (last[key][end] for end in ("ci95_low", "ci95_high"))
            share = f"{_percent(last[key]['estimate'])} of the {what} look wrong"
            if high - low > _KNOWS_NOTHING:
                share = f"how many of the {what} are wrong cannot be told"
            lines.append(f"  Noise:   {share} ({_percent(low)} to {_percent(high)}).")
    lines.append(f"  Skipped: {len(report['skipped_samples'])} clips that could not be read.")
    if run.state.report.corrections:
        lines.append(f"  Labels to keep:   {run.folder / 'labels' / run.state.report.corrections[-1]['phase']}.parquet")
    lines += [
        f"  Network to keep:  {run.folder / 'export'}",
        f"  Look inside:      tensorboard --logdir {run.folder}",
        f"  All figures:      {run.folder / 'report.json'}",
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"
