"""Plots of the noise benchmark: accuracy against label noise, votes against k, detection of mismatched pairs."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench.noise.experiments import METHODS, MOST_PAIRS

Rows = Sequence[dict[str, Any]]
COLUMNS = 3
PAIRS = {"auroc_other_class_last": "of other classes", "auroc_swapped_last": "all"}


def save(found: Mapping[str, Rows], file: Path) -> None:
    """Draw every panel that there are rows for into one file, whose ending names the format."""
    import matplotlib.pyplot as plt

    panels = [*_accuracy(found["rows"]), *_votes(found["votes"]), *_pairs(found["rows"])]
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
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _accuracy(rows: Rows) -> list[Callable[[Any], None]]:
    """One panel for each set and share of mismatched pairs with several rates of symmetric label noise."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["labels"].startswith("symmetric") and row["method"] in METHODS:
            found.setdefault((row["set"], row["pairs"]), []).append(row)

    def panel(name: str, pairs: float, some: Rows) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            for method in METHODS:
                _line(axis, [row for row in some if row["method"] == method], "test_top1", method)
            axis.set(title=f"{name}, {pairs:.0%} of pairs wrong", xlabel="share of wrong labels", ylabel="top-1, %")

        return draw

    several = {key: some for key, some in sorted(found.items()) if len({row["labels"] for row in some}) > 1}
    return [panel(*key, some) for key, some in several.items()]


def _votes(rows: Rows) -> list[Callable[[Any], None]]:
    """One panel a set: labels elected rightly by k, with a ring where the given labels are likeliest."""

    def panel(name: str) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            some = [row for row in rows if row["set"] == name]
            for number, labels in enumerate(sorted({row["labels"] for row in some})):
                mine = [row for row in some if row["labels"] == labels]
                for voters in sorted({row["second"] for row in mine}):
                    line = sorted((row["k"], row["right"]["mean"]) for row in mine if row["second"] == voters)
                    style = {"linestyle": "--" if voters else "-", "color": f"C{number}"}
                    told = f"{_rate(labels):.0%}" + (", second vote" if voters else "")
                    axis.plot(*zip(*line, strict=True), label=told, marker=".", **style)
                best = max(mine, key=lambda row: row["nats"]["mean"])
                axis.plot(best["k"], best["right"]["mean"], "o", color=f"C{number}", fillstyle="none", markersize=11)
            axis.set(title=f"{name}: votes after phase 1", xlabel="k", ylabel="elected labels right, %", xscale="log")

        return draw

    return [panel(name) for name in dict.fromkeys(row["set"] for row in rows)]


def _pairs(rows: Rows) -> list[Callable[[Any], None]]:
    """One panel: how well mismatched pairs are told from matching ones, by label noise and set."""
    some = [row for row in rows if row["method"] == "distav" and row["pairs"] == MOST_PAIRS]
    some = [row for row in some if row["labels"].startswith("symmetric") and all(key in row for key in PAIRS)]

    def draw(axis: Any) -> None:
        for name in dict.fromkeys(row["set"] for row in some):
            for key, told in PAIRS.items():
                _line(axis, [row for row in some if row["set"] == name], key, f"{name}, {told}")
        axis.set(title="mismatched pairs found", xlabel="share of wrong labels", ylabel="AUROC, %")

    return [draw] if some else []


def _line(axis: Any, rows: Rows, key: str, label: str) -> None:
    points = sorted((_rate(row["labels"]), row[key]["mean"], row[key]["sd"] or 0.0) for row in rows)
    if points:
        rates, means, spreads = zip(*points, strict=True)
        axis.errorbar(rates, means, spreads, label=label, marker="o", markersize=3, capsize=2)


def _rate(labels: str) -> float:
    return float(labels.partition(":")[2])
