"""Scores of an exported network on tasks of mteb."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb

from distav.config.errors import UserError, did_you_mean
from distav.distributed.environment import machine
from distav.models.pretrained import weights_digest
from distav.mteb import DistavEncoder

MODALITIES = frozenset(("audio", "video"))


def run(export: str, names: Sequence[str], work: Path, views: int) -> dict[str, Any]:
    """Evaluate a network on tasks, whose data mteb downloads; finished tasks are kept.

    Args:
        export: `export/` directory of a run, or `hf://USER/NAME` on the hub.
        names: names of tasks with audio or video and no text.
        work: directory for the results of mteb.
        views: evenly spaced parts of each input whose features are averaged.

    Raises:
        UserError: for an unknown task, or an export that cannot be read.
    """
    allowed = task_names()
    for name in names:
        if name not in allowed:
            raise UserError(
                f"task {name}: allowed: tasks of mteb with audio or video alone; --list shows all {len(allowed)}."
                f"{did_you_mean(name, allowed)}"
            )
    encoder = DistavEncoder(export, views=views)
    results = mteb.evaluate(encoder, mteb.get_tasks(tasks=list(names)), cache=mteb.ResultCache(work))
    rows = [
        {"task": result.task_name, "main_score": result.get_score(), "scores": result.scores}
        for result in results.task_results
    ]
    weights = {"export": export, "sha256": weights_digest(export)}
    return {"machine": machine(), "mteb": mteb.__version__, "weights": weights, "views": views, "rows": rows}


def task_names() -> list[str]:
    """Return the names of the tasks of mteb whose inputs are audio or video."""
    tasks = mteb.get_tasks(modalities=sorted(MODALITIES), exclusive_modality_filter=False)
    return sorted(task.metadata.name for task in tasks if set(task.metadata.modalities) <= MODALITIES)


def table(results: dict[str, Any]) -> str:
    """Return the main score of every task as a Markdown table."""
    lines = ["| task | main score |", "|---|---|"]
    return "\n".join(lines + [f"| {row['task']} | {row['main_score']:.4f} |" for row in results["rows"]])
