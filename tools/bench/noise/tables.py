"""Markdown tables of the noise benchmark, generated from its records."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tools.bench.noise.datasets import DATASETS
from tools.bench.noise.experiments import ABLATIONS, METHODS, PAIR_METHODS, TRUE_LABELS
from tools.bench.noise.results import over_seeds

Rows = Sequence[dict[str, Any]]
CORRECTION_COLUMNS = {
    "corrected labels, accuracy": "corrected_label_accuracy_last",
    "label noise rate, estimated": "label_noise_rate_1",
    "pair mismatch rate, estimated": "pair_mismatch_rate_last",
    "cross-class pairs, AUROC": "mismatch_auroc_other_class_last",
    "all swapped pairs, AUROC": "mismatch_auroc_swapped_last",
    "calibration error (ECE)": "ece_posterior_last",
    "wrong labels detected, F1": "f1",
    "wrong labels detected, F1, cleanlab": "f1_cleanlab",
}
"""Columns of the table of label correction and the figures they show."""
MODALITIES = {"both": "test_top1", "visual": "test_top1_visual", "audio": "test_top1_audio"}
"""Columns of the table of modalities and the figures they show."""
PHASES = {"contrastive": "contrastive", "label correction": "label_correction", "supervised": "supervised"}

_HEAD_LINES = 2


def accuracy_table(rows: Rows) -> str:
    """Return top-1 accuracy of every method in every cell, the best of each cell in bold; "" without rows."""
    rows = [row for row in rows if row["method"] in METHODS]
    if not rows:
        return ""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [_line("dataset", "label noise", "mismatched pairs", *methods), "|---" * (3 + len(methods)) + "|"]
    for cell, by_method in group_by_cell(rows).items():
        scores = {method: row["test_top1"] for method, row in by_method.items()}
        compared = [score["mean"] for method, score in scores.items() if method != TRUE_LABELS]
        texts = []
        for method in methods:
            text = _format(scores[method]) if method in scores else ""
            best = text and method != TRUE_LABELS and scores[method]["mean"] == max(compared)
            texts.append(f"**{text}**" if best and len(compared) > 1 else text)
        lines.append(_line(*_cell_columns(cell), *texts))
    return "\n".join(lines)


def correction_table(rows: Rows) -> str:
    """Return accuracy of the corrected labels and of the estimated noise rates, in %; "" without rows."""
    lines = [_line("dataset", "label noise", "mismatched pairs", *CORRECTION_COLUMNS)]
    lines.append("|---" * (3 + len(CORRECTION_COLUMNS)) + "|")
    for cell, by_method in group_by_cell(rows).items():
        if row := by_method.get("distav"):
            texts = (_format(row[key]) if key in row else "" for key in CORRECTION_COLUMNS.values())
            lines.append(_line(*_cell_columns(cell), *texts))
    return "\n".join(lines) if len(lines) > _HEAD_LINES else ""


def ablation_table(rows: Rows) -> str:
    """Return top-1 accuracy and accuracy of the corrected labels for each ablation; "" without rows."""
    cells = {cell: by_method for cell, by_method in group_by_cell(rows).items() if set(by_method) & set(ABLATIONS)}
    if not cells:
        return ""
    names = [", ".join(_cell_columns(cell)) for cell in cells]
    columns = [f"{name}: {figure}" for name in names for figure in ("top-1", "corrected labels")]
    lines = [_line("recipe", *columns), "|---" * (1 + len(columns)) + "|"]
    for method in ("distav", *ABLATIONS):
        texts = []
        for by_method in cells.values():
            row = by_method.get(method, {})
            texts += [_format(row[key]) if key in row else "" for key in ("test_top1", "corrected_label_accuracy_last")]
        if any(texts):
            lines.append(_line("full recipe" if method == "distav" else method, *texts))
    return "\n".join(lines)


def pair_table(rows: Rows) -> str:
    """Return retrieval by class and detection of mismatched pairs for each method without labels; "" without rows."""
    cells = {cell: by_method for cell, by_method in group_by_cell(rows).items() if set(by_method) & set(PAIR_METHODS)}
    if not cells:
        return ""
    rates = [f"{cell[2]:g}" for cell in cells]
    lines = []
    for title, figure in PAIR_FIGURES.items():
        lines += ["", _line(f"{title}; mismatched pairs:", *rates), "|---" * (1 + len(rates)) + "|"]
        for method in PAIR_METHODS:
            texts = [figure(by_method[method]) if method in by_method else "" for by_method in cells.values()]
            if any(texts):
                lines.append(_line(method, *texts))
    return "\n".join(lines[1:])


def time_table(records: Rows) -> str:
    """Return the time of each phase kind relative to the CE baseline of the same seed, median over cells and seeds."""
    ratios: dict[str, list[float]] = {title: [] for title in PHASES}
    for seed in {record["seed"] for record in records}:
        timed = [record for record in records if record["seed"] == seed and "seconds" in record]
        for by_method in group_by_cell(timed).values():
            if "distav" in by_method and "CE" in by_method:
                for title, kind in PHASES.items():
                    ratios[title].append(by_method["distav"][f"seconds_{kind}"] / by_method["CE"]["seconds"])
    if not ratios["contrastive"]:
        return ""
    medians = {title: statistics.median(values) for title, values in ratios.items()}
    lines = [_line("phases", "time / time of the CE baseline"), "|---|---|"]
    lines += [_line(title, f"{median:.2f}") for title, median in medians.items()]
    return "\n".join([*lines, _line("all", f"{sum(medians.values()):.2f}")])


def all_tables(records: Rows) -> list[str]:
    """Return every table for which there are records of trainings."""
    rows = over_seeds(records)
    ablated_seeds = {record["seed"] for record in records if record["method"] in ABLATIONS}
    same_seeds = over_seeds(record for record in records if record["seed"] in ablated_seeds)
    tables = (
        accuracy_table(rows),
        correction_table(rows),
        ablation_table(same_seeds),
        time_table(records),
        pair_table(rows),
    )
    return [table for table in tables if table]


def natural_tables(records: Rows) -> list[str]:
    """Return accuracy, modalities, corrected labels and the margin over the best rival for the natural datasets."""
    rows = over_seeds(records)
    tables = (accuracy_table(rows), modality_table(rows), correction_table(rows), margin(rows))
    return [table for table in tables if table]


def modality_table(rows: Rows) -> str:
    """Return top-1 accuracy of the classifiers of distav and of the best rival by modality; "" without rows."""
    lines = [_line("dataset", "label noise", "mismatched pairs", "method", *MODALITIES)]
    lines.append("|---" * (4 + len(MODALITIES)) + "|")
    for cell, by_method in group_by_cell(rows).items():
        for method in filter(None, ("distav" if "distav" in by_method else "", _best_rival(by_method))):
            row = by_method[method]
            texts = (_format(row[key]) if key in row else "" for key in MODALITIES.values())
            lines.append(_line(*_cell_columns(cell), method, *texts))
    return "\n".join(lines) if len(lines) > _HEAD_LINES else ""


def margin(rows: Rows) -> str:
    """Return how much more accurate distav is than the best rival of each cell, on average; "" without rows."""
    margins = {}
    for cell, by_method in group_by_cell(rows).items():
        rival = _best_rival(by_method)
        if "distav" in by_method and rival:
            own, other = by_method["distav"]["test_top1"], by_method[rival]["test_top1"]
            margins[cell] = own["mean"] - other["mean"], max(own["sd"] or 0.0, other["sd"] or 0.0)
    if not margins:
        return ""
    noisy = [difference for cell, (difference, _) in margins.items() if cell[1] or cell[2]]
    below = sum(difference < -deviation for difference, deviation in margins.values())
    text = f"distav is more than a standard deviation below the best rival in {below} of {len(margins)} cells."
    if noisy:
        mean = f"{statistics.fmean(noisy):+.1f} points"
        text = f"Mean margin over the best rival of each cell in {len(noisy)} noisy cells: {mean}; {text}"
    return text


def _best_rival(by_method: dict[str, dict[str, Any]]) -> str:
    rivals = [method for method in by_method if method not in ("distav", TRUE_LABELS)]
    return max(rivals, key=lambda method: by_method[method]["test_top1"]["mean"], default="")


def group_by_cell(rows: Rows) -> dict[tuple[str, str, float], dict[str, dict[str, Any]]]:
    """Return the rows of each cell by method; cells are ordered by dataset and by increasing noise."""
    cells: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cell = row["dataset"], row["label_noise"], row["mismatch_rate"]
        cells.setdefault(cell, {})[row["method"]] = row
    datasets = list(DATASETS)
    return dict(sorted(cells.items(), key=lambda item: (datasets.index(item[0][0]), *item[0][1:])))


def _cell_columns(cell: tuple[str, str, float]) -> tuple[str, str, str]:
    return cell[0], cell[1] or "none", f"{cell[2]:g}"


def _format(score: dict[str, float | None]) -> str:
    return f"{score['mean']:.1f}" + ("" if score["sd"] is None else f" ± {score['sd']:.1f}")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _retrieval(row: dict[str, Any]) -> str:
    return f"{_format(row['test_v2a_map'])} / {_format(row['test_a2v_map'])}"


def _detection(row: dict[str, Any]) -> str:
    keys = ("correspondence_auroc_correspondence", "correspondence_auroc_similarity")
    return next((_format(row[key]) for key in keys if key in row), "")


PAIR_FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "retrieval mAP, video-to-audio / audio-to-video": _retrieval,
    "mismatch detection AUROC, by correspondence probability or else by similarity": _detection,
}
