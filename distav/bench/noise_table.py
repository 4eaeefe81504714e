"""Tables and plots of the noise benchmark, from its JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distav.bench.noise_grid import METHODS

Rows = Sequence[dict[str, Any]]
DETAILS = {
    "labels right after": "labels_corrected_last",
    "label noise told": "label_rate_1",
    "pair noise told": "pair_rate_last",
    "pairs of other classes, AUROC": "auroc_other_class_last",
    "all swapped pairs, AUROC": "auroc_swapped_last",
    "calibration error": "labels_calibration_error_posterior_last",
    "wrong labels found, F1": "f1",
    "the same, cleanlab": "f1_cleanlab",
}


def accuracy(rows: Rows) -> str:
    """Return top-1 of every method in every cell as Markdown, the best of each cell in bold."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [_line("set", "label noise", "pair noise", *methods), "|---" * (3 + len(methods)) + "|"]
    for cell, found in _by_cell(rows).items():
        scores = {method: row["test_top1"] for method, row in found.items()}
        fair = [score["mean"] for method, score in scores.items() if method != "true labels"]
        told = []
        for method in methods:
            text = _spread(scores[method]) if method in scores else ""
            told.append(f"**{text}**" if text and scores[method]["mean"] == max(fair) else text)
        lines.append(_line(*_cell(cell), *told))
    return "\n".join(lines)


def correction(rows: Rows) -> str:
    """Return what distav's correction made of the labels and what it told of the noise, in %, as Markdown."""
    lines = [_line("set", "label noise", "pair noise", *DETAILS), "|---" * (3 + len(DETAILS)) + "|"]
    for cell, found in _by_cell(rows).items():
        if row := found.get("distav"):
            told = (_spread(row[key]) if key in row else "" for key in DETAILS.values())
            lines.append(_line(*_cell(cell), *told))
    return "\n".join(lines)


def plots(rows: Rows, file: Path) -> None:
    """Draw accuracy against label noise, one panel for each set and share of mismatched pairs with several rates."""
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["labels"].startswith("symmetric"):
            panels.setdefault((row["set"], row["pairs"]), []).append(row)
    panels = {key: found for key, found in panels.items() if len({row["labels"] for row in found}) > 1}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), sharey=True, squeeze=False)
    for axis, ((name, pairs), found) in zip(axes[0], sorted(panels.items()), strict=True):
        for method in METHODS:
            line = sorted((_rate(row), row["test_top1"]) for row in found if row["method"] == method)
            if line:
                rates, scores = zip(*line, strict=True)
                means, spreads = ([score[key] for score in scores] for key in ("mean", "sd"))
                axis.errorbar(rates, means, spreads, label=method, marker="o", markersize=3, capsize=2)
        axis.set(title=f"{name}, pairs {pairs:g}", xlabel="share of wrong labels")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("top-1, %")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _by_cell(rows: Rows) -> dict[tuple[str, str, float], dict[str, dict[str, Any]]]:
    cells: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["labels"], row["pairs"]), {})[row["method"]] = row
    return cells


def _cell(cell: tuple[str, str, float]) -> tuple[str, str, str]:
    return cell[0], cell[1] or "none", f"{cell[2]:g}"


def _rate(row: dict[str, Any]) -> float:
    return float(row["labels"].partition(":")[2])


def _spread(score: dict[str, float]) -> str:
    return f"{score['mean']:.1f} ± {score['sd']:.1f}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
