"""Entries of a run's summary for multi-label datasets."""

from typing import Any

_NAMES = {"": "video and audio", "_visual": "video only", "_audio": "audio only"}
Entries = list[tuple[str, str]]


def list_label_entries(correction: dict[str, Any]) -> Entries:
    """Return the entry on the label lists before and after a correction, an entry of report.json."""
    accuracy = correction.get("label_accuracy")
    if accuracy is None:
        text = f"{correction['added_labels']} labels added and {correction['removed_labels']} removed by correction"
        return [("Labels", text)]
    text = (
        f"F1 {percent(accuracy['f1_given'])} -> {percent(accuracy['f1_corrected'])} "
        f"({percent(accuracy['missing_labels_restored'])} of missing labels restored, "
        f"{percent(accuracy['wrong_labels_removed'])} of wrong labels removed, "
        f"{percent(accuracy['right_labels_broken'])} of right labels broken)"
    )
    return [("Labels", text)]


def list_test_entries(test: dict[str, Any]) -> Entries:
    """Return the entries on the classifiers; none if no classifier was trained."""
    if "map" not in test:
        return []
    chance = f"; chance {percent(test['chance'])}" if "chance" in test else ""
    return [("Test", f"mAP {_values(test, 'map')}{chance}"), ("Test", f"micro F1 {_values(test, 'f1_micro')}")]


def list_noise_entries(correction: dict[str, Any]) -> Entries:
    """Return the entries on the noise rates of a correction."""
    if not correction["has_signal"]:
        text = "not estimated: k-NN votes carry no label signal, the given labels are kept; train for more epochs"
        return [("Noise", text)]
    entries: Entries = []
    for name, key in (("missing label rate", "missing_label_rate"), ("wrong label rate", "wrong_label_rate")):
        entries.append(("Noise", f"{name} {rate_text(correction[key])}"))
    if "warning" in correction:
        entries.append(("Warning", correction["warning"]))
    return entries


def rate_text(rate: dict[str, float]) -> str:
    """Return a rate with its interval."""
    interval = f"95 % interval {percent(rate['ci95_low'])} to {percent(rate['ci95_high'])}"
    return f"{percent(rate['estimate'])} ({interval})"


def _values(test: dict[str, Any], metric: str) -> str:
    """Return the values of a metric for the classifiers that have test clips."""
    return ", ".join(
        f"{percent(test[metric + suffix])} ({name})" for suffix, name in _NAMES.items() if metric + suffix in test
    )


def percent(fraction: float | None) -> str:
    """Return a fraction in percent."""
    return "n/a" if fraction is None else f"{100 * fraction:.1f} %"
