"""Tables of the noise benchmark, from its JSON file."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tools.bench.noise.experiments import ABLATIONS, METHODS, PAIR_METHODS, SETS, TRUE_LABELS
from tools.bench.noise.results import over_seeds

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

_HEAD = 2
"""Lines of a table without rows."""


def accuracy(rows: Rows) -> str:
    """Return top-1 of every method in every cell as Markdown, the best of each cell in bold."""
    rows = [row for row in rows if row["method"] in METHODS]
    if not rows:
        return ""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [_line("set", "label noise", "pair noise", *methods), "|---" * (3 + len(methods)) + "|"]
    for cell, found in by_cell(rows).items():
        scores = {method: row["test_top1"] for method, row in found.items()}
        rivals = [score["mean"] for method, score in scores.items() if method != TRUE_LABELS]
        told = []
        for method in methods:
            text = _spread(scores[method]) if method in scores else ""
            best = text and method != TRUE_LABELS and scores[method]["mean"] == max(rivals)
            told.append(f"**{text}**" if best and len(rivals) > 1 else text)
        lines.append(_line(*_cell(cell), *told))
    return "\n".join(lines)


def correction(rows: Rows) -> str:
    """Return what distav's correction made of the labels and what it told of the noise, in %, as Markdown."""
    lines = [_line("set", "label noise", "pair noise", *DETAILS), "|---" * (3 + len(DETAILS)) + "|"]
    for cell, found in by_cell(rows).items():
        if row := found.get("distav"):
            told = (_spread(row[key]) if key in row else "" for key in DETAILS.values())
            lines.append(_line(*_cell(cell), *told))
    return "\n".join(lines) if len(lines) > _HEAD else ""


def ablation(rows: Rows) -> str:
    """Return the recipe with single components off or exchanged: top-1, and labels right after correction."""
    cells = {cell: found for cell, found in by_cell(rows).items() if set(found) & set(ABLATIONS)}
    if not cells:
        return ""
    names = [", ".join(_cell(cell)) for cell in cells]
    columns = [f"{name}: {what}" for name in names for what in ("top-1", "labels right")]
    lines = [_line("recipe", *columns), "|---" * (1 + len(columns)) + "|"]
    for method in ("distav", *ABLATIONS):
        told = []
        for found in cells.values():
            row = found.get(method, {})
            told += [_spread(row[key]) if key in row else "" for key in ("test_top1", "labels_corrected_last")]
        if any(told):
            lines.append(_line("as it is" if method == "distav" else method, *told))
    return "\n".join(lines)


def pairs(rows: Rows) -> str:
    """Return retrieval by class and mismatched pairs found, of every way to learn from them, as Markdown."""
    cells = {cell: found for cell, found in by_cell(rows).items() if set(found) & set(PAIR_METHODS)}
    if not cells:
        return ""
    rates = [f"{cell[2]:g}" for cell in cells]
    lines = []
    for what, figure in PAIR_FIGURES.items():
        lines += ["", _line(f"{what}; pair noise", *rates), "|---" * (1 + len(rates)) + "|"]
        for method in PAIR_METHODS:
            told = [figure(found[method]) if method in found else "" for found in cells.values()]
            if any(told):
                lines.append(_line(method, *told))
    return "\n".join(lines[1:])


def times(records: Rows) -> str:
    """Return how long phases take beside cross-entropy's training of the same seed, medians over cells and seeds."""
    ratios: dict[str, list[float]] = {kind: [] for kind in ("contrastive", "correction", "supervised")}
    for seed in {record["seed"] for record in records}:
        for found in by_cell([each for each in records if each["seed"] == seed and "seconds" in each]).values():
            if "distav" in found and "ce" in found:
                for kind, values in ratios.items():
                    values.append(found["distav"][f"seconds_{kind}"] / found["ce"]["seconds"])
    if not ratios["contrastive"]:
        return ""
    shares = {kind: statistics.median(values) for kind, values in ratios.items()}
    lines = [_line("phases", "time / time of cross-entropy's training"), "|---|---|"]
    lines += [_line(kind, f"{share:.2f}") for kind, share in shares.items()]
    return "\n".join([*lines, _line("all", f"{sum(shares.values()):.2f}")])


def every(records: Rows) -> list[str]:
    """Return every table that the records of trainings have something for."""
    rows = over_seeds(records)
    ablated = {record["seed"] for record in records if record["method"] in ABLATIONS}
    beside = over_seeds(record for record in records if record["seed"] in ablated)
    return [text for text in (accuracy(rows), correction(rows), ablation(beside), times(records), pairs(rows)) if text]


def by_cell(rows: Rows) -> dict[tuple[str, str, float], dict[str, dict[str, Any]]]:
    """Return the rows of each cell by method, cells in the order of sets and of growing noise."""
    cells: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["labels"], row["pairs"]), {})[row["method"]] = row
    return dict(sorted(cells.items(), key=lambda each: (list(SETS).index(each[0][0]), *each[0][1:])))


def _cell(cell: tuple[str, str, float]) -> tuple[str, str, str]:
    return cell[0], cell[1] or "none", f"{cell[2]:g}"


def _spread(score: dict[str, float | None]) -> str:
    return f"{score['mean']:.1f}" + ("" if score["sd"] is None else f" ± {score['sd']:.1f}")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _both_ways(row: dict[str, Any]) -> str:
    return f"{_spread(row['test_v2a_map'])} / {_spread(row['test_a2v_map'])}"


def _detection(row: dict[str, Any]) -> str:
    keys = ("correspondence_auroc_correspondence", "correspondence_auroc_similarity")
    return next((_spread(row[key]) for key in keys if key in row), "")


PAIR_FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "mAP of sounds for pictures / pictures for sounds": _both_ways,
    "AUROC of the correspondence, or where none is estimated of the similarity": _detection,
}
