"""Functions that run the phases, and the loop over the phases of a run.

Another package adds a kind of phase by an entry point of the group `distav.phases`, whose name is the kind. It refers
to the phase's config dataclass, which has a setting `kind` with that name as its default and a static method
`run(run: Run, name: str, config)` that runs the phase:

    @dataclass
    class WarmUpPhase:
        kind: str = "warm_up"
        steps: int = 100

        @staticmethod
        def run(run: Run, name: str, config: "WarmUpPhase") -> None: ...
"""

from collections.abc import Callable
from typing import Any

from distav.config.errors import UserError
from distav.config.phases import ContrastivePhase, EventParsingPhase, LabelCorrectionPhase, SupervisedPhase
from distav.distributed.rendezvous import set_stage
from distav.training.phases.contrastive import run_contrastive
from distav.training.phases.event_parsing import run_parsing
from distav.training.phases.label_correction import run_correction
from distav.training.phases.supervised import run_supervised
from distav.training.run import Run

PhaseFunction = Callable[[Run, str, Any], None]
"""Runs a phase; takes the run, the name of the phase and its config."""

PHASES: dict[type, PhaseFunction] = {
    ContrastivePhase: run_contrastive,
    LabelCorrectionPhase: run_correction,
    SupervisedPhase: run_supervised,
    EventParsingPhase: run_parsing,
}
"""Functions of the phases of `distav.config.phases.PHASE_KINDS` that distav defines, by config dataclass."""


def phase_function(name: str, config: Any) -> PhaseFunction:
    """Return the function that runs a phase.

    Raises:
        UserError: if another package provides the phase without a function.
    """
    function: PhaseFunction | None = PHASES.get(type(config)) or getattr(config, "run", None)
    if function is None:
        raise UserError(
            f"phases.{name}.kind={config.kind}: {type(config).__module__}.{type(config).__name__} has no static method "
            "run(run, name, config). Add it, or uninstall the package that provides the phase."
        )
    return function


def run_remaining(run: Run) -> None:
    """Run all phases from the current one on, and save a checkpoint after each."""
    functions = {name: phase_function(name, config) for name, config in run.config.phases.items()}
    for number, (name, config) in enumerate(run.config.phases.items()):
        if number < run.progress.phase:
            continue
        run.start_phase_timer()
        set_stage(name)
        functions[name](run, name, config)
        seconds, steps = run.seconds_in_phase(), run.progress.step
        clips = steps * run.config.optim.global_batch or len(run.data.train)
        entry = {
            "name": name,
            "kind": config.kind,
            "steps": steps,
            "seconds": round(seconds, 2),
            "clips_per_s": round(clips / max(seconds, 1e-9), 1),
        }
        run.state.report.phases.append(entry)
        run.progress.phase, run.progress.step = number + 1, 0
        run.progress.skipped_batches = run.progress.extracted_batches = 0
        run.start_phase_timer(reset=True)
        run.save()
