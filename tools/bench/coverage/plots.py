"""Plot of the true and the estimated rates of every problem, by family."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
COLUMNS = 5
RATES = {"label_rate": ("label noise", "C0"), "pair_rate": ("pair mismatch", "C1")}
MISSED = "C3"
"""Color of intervals that do not cover the truth."""


def save(rows: Rows, path: Path) -> None:
    """Draw one panel for each family into one file; its suffix selects the format.

    Args:
        rows: scores.
        path: the file.
    """
    import matplotlib.pyplot as plt

    families = list(dict.fromkeys(row["family"] for row in rows))
    height = max(1, math.ceil(len(families) / COLUMNS))
    figure, axes = plt.subplots(height, COLUMNS, figsize=(3.2 * COLUMNS, 3.2 * height), squeeze=False)
    for axis in axes.flat[len(families) :]:
        axis.axis("off")
    for axis, family in zip(axes.flat, families, strict=False):
        _draw(axis, family, [row for row in rows if row["family"] == family])
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "coverage"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw(axis: Any, family: str, rows: Rows) -> None:
    for key, (title, color) in RATES.items():
        for covered in (True, False):
            rates = [row[key] for row in rows if row[key]["covered"] is covered]
            true = [100 * rate["true"] for rate in rates]
            estimates = [100 * rate["estimate"] for rate in rates]
            # An estimate may be outside its own interval, where error bars have no length.
            below = [100 * max(0.0, rate["estimate"] - rate["ci95_low"]) for rate in rates]
            above = [100 * max(0.0, rate["ci95_high"] - rate["estimate"]) for rate in rates]
            marker = {"marker": "o" if key == "label_rate" else "s", "markersize": 2.5, "linestyle": "none"}
            line = {"color": color if covered else MISSED, "elinewidth": 0.7, "markerfacecolor": color}
            label = title if covered else f"{title}, outside"
            axis.errorbar(true, estimates, [below, above], label=label if rates else None, **marker, **line)
    axis.plot([0, 100], [0, 100], color="gray", linewidth=0.5)
    axis.set(title=family, xlabel="true rate, %", ylabel="estimated rate, %", xlim=(-2, 102), ylim=(-2, 102))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)
