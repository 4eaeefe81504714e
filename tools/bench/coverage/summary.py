"""Summary of the scores: a table by family, and the thresholds of the benchmark."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tools.bench.timing import Results

Rows = Sequence[Mapping[str, Any]]
MIN_COVERAGE, MIN_FAMILY_COVERAGE = 0.9, 0.85
MAX_MEDIAN_WIDTH, WIDTH_SAMPLES = 0.08, 2000
"""Largest median width of the intervals of problems with at least this number of samples."""
NEAR, MIN_NEAR_FRACTION = 0.03, 0.8
"""An estimate within this distance of the truth is near, and at least this fraction of the estimates has to be."""
MAX_EXCESS_BROKEN = 0.02
"""Largest fraction of right labels that is broken beyond the expected number."""
OVERALL = "all with a signal"
"""Row of the table for all problems with a signal."""


def _covered(key: str) -> Callable[[Rows], float]:
    return lambda rows: float(np.mean([row[key]["covered"] for row in rows]))


def _width(key: str) -> Callable[[Rows], float]:
    return lambda rows: float(np.median([row[key]["ci95_high"] - row[key]["ci95_low"] for row in rows]))


def _near(key: str) -> Callable[[Rows], float]:
    return lambda rows: float(np.mean([abs(row[key]["estimate"] - row[key]["true"]) <= NEAR for row in rows]))


def _excess_broken(rows: Rows) -> float:
    return max(row["broken"] - row["broken_expected"] for row in rows)


def _class_coverage(rows: Rows) -> float:
    values = [row["class_coverage"] for row in rows if row["class_coverage"] is not None]
    return float(np.mean(values)) if values else float("nan")


def _corrected(rows: Rows) -> Rows:
    """Return the rows of corrections that found a signal; the others keep the given labels with probability 1."""
    return [row for row in rows if row["has_signal"]]


def _quantile(key: str, level: float) -> Callable[[Rows], float]:
    def value(rows: Rows) -> float:
        values = [row[key] for row in _corrected(rows)]
        return float(np.quantile(values, level)) if values else float("nan")

    return value


def _mean(key: str) -> Callable[[Rows], float]:
    def value(rows: Rows) -> float:
        values = [row[key] for row in rows if row[key] is not None]
        return float(np.mean(values)) if values else float("nan")

    return value


def _difference(rows: Rows) -> float:
    """Return the median difference of the estimated noise rate and the expected fraction of wrong labels."""
    differences = [abs(row["label_rate"]["estimate"] - row["wrong_expected"]) for row in _corrected(rows)]
    return float(np.median(differences)) if differences else float("nan")


def _signal_agreement(rows: Rows) -> float:
    return float(np.mean([row["has_signal"] == row["signal"] for row in rows]))


FIGURES: dict[str, Callable[[Rows], float]] = {
    "label coverage": _covered("label_rate"),
    "pair coverage": _covered("pair_rate"),
    "class coverage": _class_coverage,
    "label width": _width("label_rate"),
    "pair width": _width("pair_rate"),
    "label near": _near("label_rate"),
    "pair near": _near("pair_rate"),
    "broken": _mean("broken"),
    "broken, expected": _mean("broken_expected"),
    "broken beyond expected, max": _excess_broken,
    "ECE, median": _quantile("ece", 0.5),
    "ECE, 90 %": _quantile("ece", 0.9),
    "right before": _mean("labels_right_before"),
    "right after": _mean("labels_right_after"),
    "pair AUROC": _mean("correspondence_auroc"),
    "estimate vs. posterior": _difference,
    "signal found": _signal_agreement,
}
"""Columns of the table: figures of the rows of a family, as fractions."""
LEGEND = (
    "Coverage: fraction of the problems (classes) whose 95 % interval covers the true rate. Width: median width of the "
    f"intervals. Near: fraction of the estimates within {100 * NEAR:.0f} points. Broken: right labels that were "
    "changed. ECE: calibration error of the posterior where a signal was found. Estimate vs. posterior: median "
    "difference of the estimated noise rate and the mean probability of the posterior that the given label is wrong. "
    "Signal found: fraction of the problems in which the correction agrees with a classifier with true labels whether "
    "the features are informative. All in %."
)


def summarize(rows: Rows) -> dict[str, dict[str, float]]:
    """Return the number of problems and all figures for each family, and for all problems with a signal."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["family"], []).append(row)
    signal = [row for row in rows if row["signal"]]
    if signal:
        groups[OVERALL] = signal
    return {
        name: {"problems": len(group)} | {title: figure(group) for title, figure in FIGURES.items()}
        for name, group in groups.items()
    }


def results(rows: Rows, arguments: Mapping[str, Any]) -> Results:
    """Return the thresholds with their values, without those that no problem belongs to."""
    summary = summarize(rows)
    outcome = Results("coverage", dict(arguments))
    signal = [row for row in rows if row["signal"]]
    large = [row for row in signal if row["num_samples"] >= WIDTH_SAMPLES]
    for title in ("label", "pair", "class"):
        coverage = {name: figures[f"{title} coverage"] for name, figures in summary.items() if name != OVERALL}
        coverage = {name: value for name, value in coverage.items() if not np.isnan(value)}
        if signal:
            value = float(summary[OVERALL][f"{title} coverage"])
            _add(outcome, f"{title} coverage, problems with a signal", value, f">= {MIN_COVERAGE}")
        if coverage:
            _add(outcome, f"{title} coverage, lowest family", min(coverage.values()), f">= {MIN_FAMILY_COVERAGE}")
    for title in ("label", "pair"):
        if large:
            name = f"{title} width, median, {WIDTH_SAMPLES} or more samples"
            _add(outcome, name, FIGURES[f"{title} width"](large), f"<= {MAX_MEDIAN_WIDTH}")
        if signal:
            name = f"{title} estimates within {100 * NEAR:.0f} points"
            _add(outcome, name, FIGURES[f"{title} near"](signal), f">= {MIN_NEAR_FRACTION}")
    _add(outcome, "right labels broken beyond the expected number", _excess_broken(rows), f"<= {MAX_EXCESS_BROKEN}")
    return outcome


def _add(outcome: Results, name: str, value: float, threshold: str) -> None:
    if not np.isnan(value):
        outcome.add_ratio(name, value, threshold)


def table(rows: Rows, baseline: Rows | None = None) -> str:
    """Return the figures of each family in % as a Markdown table.

    Args:
        rows: scores.
        baseline: scores of the same problems before a change; cells then show both.
    """
    summary = summarize(rows)
    before = summarize(baseline) if baseline is not None else {}
    lines = [_line("family", "problems", *FIGURES), "|---" * (2 + len(FIGURES)) + "|"]
    for name, figures in summary.items():
        cells = [_cell(title, figures, before.get(name)) for title in FIGURES]
        lines.append(_line(f"**{name}**" if name == OVERALL else name, str(figures["problems"]), *cells))
    return "\n".join(lines)


def _cell(title: str, figures: Mapping[str, float], before: Mapping[str, float] | None) -> str:
    text = _percent(figures[title])
    return f"{_percent(before[title])} → {text}" if before is not None else text


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def changes(rows: Rows, baseline: Rows) -> str:
    """Return the names of the problems whose coverage differs from that of the baseline."""
    before = {row["name"]: row for row in baseline}
    lines = []
    for key, title in (("label_rate", "label"), ("pair_rate", "pair")):
        changed = [row for row in rows if row[key]["covered"] != before[row["name"]][key]["covered"]]
        for verb, covered in (("now covered", True), ("no longer covered", False)):
            names = [row["name"] for row in changed if row[key]["covered"] is covered]
            lines.append(f"{title} rate {verb} ({len(names)}): {', '.join(names)}".rstrip(": "))
    return "\n".join(lines)


def worst(rows: Rows, number: int = 12) -> str:
    """Return the problems with a signal that fail most: rates outside their interval, and broken labels."""
    lines = []
    signal = [row for row in rows if row["signal"]]
    for key, title in (("label_rate", "label"), ("pair_rate", "pair")):
        missed = sorted((row for row in signal if not row[key]["covered"]), key=lambda row: -_distance(row[key]))
        lines.append(f"{title} rate outside the interval: {len(missed)} problems with a signal")
        lines += [f"  {_description(row)}: {_interval(row[key])}" for row in missed[:number]]
    excess = {row["name"]: row["broken"] - row["broken_expected"] for row in rows}
    broken = sorted(
        (row for row in rows if excess[row["name"]] > MAX_EXCESS_BROKEN), key=lambda row: -excess[row["name"]]
    )
    lines.append(f"right labels broken beyond the expected number: {len(broken)} problems")
    for row in broken[:number]:
        lines.append(
            f"  {_description(row)}: {100 * row['broken']:.1f} %, expected {100 * row['broken_expected']:.1f} %"
        )
    return "\n".join(lines)


def _distance(rate: Mapping[str, float]) -> float:
    """Return the distance of the true rate from an interval that does not cover it."""
    return max(rate["ci95_low"] - rate["true"], rate["true"] - rate["ci95_high"])


def _interval(rate: Mapping[str, float]) -> str:
    low, high = 100 * rate["ci95_low"], 100 * rate["ci95_high"]
    return f"{100 * rate['true']:.1f} % estimated {100 * rate['estimate']:.1f} % [{low:.1f}, {high:.1f}]"


def _description(row: Mapping[str, Any]) -> str:
    accuracies = f"reference {100 * row['visual_accuracy']:.0f} % / {100 * row['audio_accuracy']:.0f} %"
    sizes = f"{row['num_samples']} samples, {row['num_classes']} classes"
    return f"{row['name']} ({sizes}, {row.get('label_noise', 'stored')}, {accuracies})"


def common(rows: Iterable[Mapping[str, Any]], baseline: Iterable[Mapping[str, Any]]) -> tuple[Rows, Rows]:
    """Return the rows of the problems that both have, in the same order."""
    by_name = {row["name"]: row for row in baseline}
    both = [row for row in rows if row["name"] in by_name]
    return both, [by_name[row["name"]] for row in both]
