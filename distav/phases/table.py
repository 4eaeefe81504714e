"""Which function runs which kind of phase, and the loop over them."""

import time
from collections.abc import Callable
from typing import Any

from distav.phases.contrastive import run_contrastive
from distav.phases.correction import run_correction
from distav.phases.hybrid import run_hybrid
from distav.run import Run

PHASES: dict[str, Callable[[Run, str, Any], None]] = {
    "contrastive": run_contrastive,
    "correction": run_correction,
    "hybrid": run_hybrid,
}


def run_remaining(run: Run) -> None:
    """Run the phases from where the run stands, with a checkpoint after each."""
    for number, (name, settings) in enumerate(run.settings.phases.items()):
        if number < run.position.phase:
            continue
        began, steps_before = time.monotonic(), run.position.step
        PHASES[settings.kind](run, name, settings)
        seconds = time.monotonic() - began
        steps = run.position.step
        clips = (steps - steps_before) * run.settings.optim.global_batch or len(run.data.train)
        earlier = run.notes.setdefault("phase_seconds", {})
        entry = {
            "name": name,
            "kind": settings.kind,
            "steps": steps,
            "seconds": round(seconds + earlier.pop(name, 0.0), 2),
            "clips_per_s": round(clips / max(seconds, 1e-9), 1),
        }
        run.notes.setdefault("phases", []).append(entry)
        run.position.phase, run.position.step = number + 1, 0
        run.save()
