"""Which function runs which kind of phase, and the loop over them."""

from collections.abc import Callable
from typing import Any

from distav.distributed.rendezvous import set_stage
from distav.training.phases.contrastive import run_contrastive
from distav.training.phases.event_parsing import run_parsing
from distav.training.phases.label_correction import run_correction
from distav.training.phases.supervised import run_supervised
from distav.training.run import Run

PHASES: dict[str, Callable[[Run, str, Any], None]] = {
    "contrastive": run_contrastive,
    "label_correction": run_correction,
    "supervised": run_supervised,
    "parsing": run_parsing,
}


def run_remaining(run: Run) -> None:
    """Run the phases from where the run stands, with a checkpoint after each."""
    for number, (name, settings) in enumerate(run.settings.phases.items()):
        if number < run.progress.phase:
            continue
        run.start_phase_timer()
        set_stage(name)
        PHASES[settings.kind](run, name, settings)
        seconds, steps = run.seconds_in_phase(), run.progress.step
        clips = steps * run.settings.optim.global_batch or len(run.data.train)
        entry = {
            "name": name,
            "kind": settings.kind,
            "steps": steps,
            "seconds": round(seconds, 2),
            "clips_per_s": round(clips / max(seconds, 1e-9), 1),
        }
        run.state.report.phases.append(entry)
        run.progress.phase, run.progress.step = number + 1, 0
        run.progress.skipped_batches = run.progress.extracted_batches = 0
        run.start_phase_timer(reset=True)
        run.save()
