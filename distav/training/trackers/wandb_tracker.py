"""Weights & Biases."""

import os
from typing import Any

import numpy as np

from distav.training.trackers.external import ExternalTracker, TrackedRun

DEFAULT_PROJECT = "distav"


class WandbTracker(ExternalTracker):
    """A run of Weights & Biases.

    Project, entity, mode and others are those of its environment variables: `WANDB_PROJECT` (distav if it is not set),
    `WANDB_ENTITY`, `WANDB_MODE`, `WANDB_DIR` (the run directory). Metrics have the axis `step`: the internal step of
    W&B can neither repeat nor go back, and a label correction logs at the last step of the phase before it.
    """

    package = "wandb"

    def __init__(self, run: TrackedRun):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            name=run.name,
            id=run.tracker_id,
            resume="allow" if run.tracker_id else None,
            config=run.settings,
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.tracker_id = self._run.id
        self._is_finished = False

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log finite numbers by key."""
        self._run.log({"step": step, **values})

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image: [H, W, 3] uint8."""
        self._run.log({"step": step, tag: self._wandb.Image(image)})

    def log_report(self, report: dict[str, Any]) -> None:
        """Log the content of report.json as `report` of the run's summary."""
        self._run.summary["report"] = report
        self._is_finished = True

    def close(self) -> None:
        """Wait until all values are sent; a run without a report counts as failed."""
        self._run.finish(exit_code=0 if self._is_finished else 1)
