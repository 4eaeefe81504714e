"""Plots of the noise benchmark: accuracy by label noise, k-NN votes by k, detection of mismatched pairs."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench.noise.experiments import MAX_MISMATCH_RATE, METHODS

Rows = Sequence[dict[str, Any]]
Panel = Callable[[Any], None]
"""Draws into a Matplotlib axis."""
COLUMNS = 3
DETECTION_FIGURES = {"mismatch_auroc_other_class_last": "cross-class", "mismatch_auroc_swapped_last": "all"}


def save(rows: Mapping[str, Rows], path: Path) -> None:
    """Draw every panel that has rows into one file; its suffix selects the format.

    Args:
        rows: `rows` of trainings and `votes`, averaged over seeds.
        path: the file.
    """
    import matplotlib.pyplot as plt

    panels = [*_accuracy_panels(rows["rows"]), *_vote_panels(rows["votes"]), *_detection_panels(rows["rows"])]
    height = max(1, math.ceil(len(panels) / COLUMNS))
    figure, axes = plt.subplots(height, COLUMNS, figsize=(4 * COLUMNS, 3.4 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "noise"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _accuracy_panels(rows: Rows) -> list[Panel]:
    """Return a panel for each dataset and mismatch rate with several rates of symmetric label noise."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["label_noise"].startswith("symmetric") and row["method"] in METHODS:
            groups.setdefault((row["dataset"], row["mismatch_rate"]), []).append(row)

    def panel(dataset: str, mismatch_rate: float, group: Rows) -> Panel:
        def draw(axis: Any) -> None:
            for method in METHODS:
                _error_bars(axis, [row for row in group if row["method"] == method], "test_top1", method)
            title = f"{dataset}, {mismatch_rate:.0%} mismatched pairs"
            axis.set(title=title, xlabel="label noise rate", ylabel="top-1, %")

        return draw

    several = {key: group for key, group in sorted(groups.items()) if len({row["label_noise"] for row in group}) > 1}
    return [panel(*key, group) for key, group in several.items()]


def _vote_panels(rows: Rows) -> list[Panel]:
    """Return a panel for each dataset: vote accuracy by k, with a ring at the largest log-likelihood gain."""

    def panel(dataset: str) -> Panel:
        def draw(axis: Any) -> None:
            group = [row for row in rows if row["dataset"] == dataset]
            for number, label_noise in enumerate(sorted({row["label_noise"] for row in group})):
                _vote_lines(axis, [row for row in group if row["label_noise"] == label_noise], f"C{number}")
            title = f"{dataset}: votes after pretraining"
            axis.set(title=title, xlabel="k", ylabel="vote accuracy, %", xscale="log")

        return draw

    return [panel(dataset) for dataset in dict.fromkeys(row["dataset"] for row in rows)]


def _vote_lines(axis: Any, rows: Rows, color: str) -> None:
    for second_round in sorted({row["second_round_neighbors"] for row in rows}):
        points = sorted(
            (row["k"], row["label_accuracy"]["mean"]) for row in rows if row["second_round_neighbors"] == second_round
        )
        label = f"{_rate(rows[0]['label_noise']):.0%}" + (", second round" if second_round else "")
        style = "--" if second_round else "-"
        axis.plot(*zip(*points, strict=True), label=label, marker=".", linestyle=style, color=color)
    best = max(rows, key=lambda row: row["log_likelihood_gain"]["mean"])
    axis.plot(best["k"], best["label_accuracy"]["mean"], "o", color=color, fillstyle="none", markersize=11)


def _detection_panels(rows: Rows) -> list[Panel]:
    """Return one panel: AUROC of the detection of mismatched pairs by label noise and dataset."""
    rows = [row for row in rows if row["method"] == "distav" and row["mismatch_rate"] == MAX_MISMATCH_RATE]
    rows = [
        row
        for row in rows
        if row["label_noise"].startswith("symmetric") and all(key in row for key in DETECTION_FIGURES)
    ]

    def draw(axis: Any) -> None:
        for dataset in dict.fromkeys(row["dataset"] for row in rows):
            for key, pairs in DETECTION_FIGURES.items():
                _error_bars(axis, [row for row in rows if row["dataset"] == dataset], key, f"{dataset}, {pairs}")
        axis.set(title="detection of mismatched pairs", xlabel="label noise rate", ylabel="AUROC, %")

    return [draw] if rows else []


def _error_bars(axis: Any, rows: Rows, key: str, label: str) -> None:
    points = sorted((_rate(row["label_noise"]), row[key]["mean"], row[key]["sd"] or 0.0) for row in rows)
    if points:
        rates, means, deviations = zip(*points, strict=True)
        axis.errorbar(rates, means, deviations, label=label, marker="o", markersize=3, capsize=2)


def _rate(label_noise: str) -> float:
    return float(label_noise.partition(":")[2])
