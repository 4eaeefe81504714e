"""MLflow."""

import os
import re
import time
from typing import Any

import numpy as np

from distav.training.run_dir import leaves
from distav.training.trackers.external import ExternalTracker, TrackedRun

DEFAULT_EXPERIMENT = "distav"
_MAX_PARAMETERS, _MAX_LENGTH = 100, 6000
"""Parameters of one call and characters of one parameter that MLflow accepts."""


class MlflowTracker(ExternalTracker):
    """A run of MLflow.

    Server and experiment are those of its environment variables: `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`
    (distav if it is not set). Settings are parameters; images and report.json are artifacts. The @ in names of metrics,
    which MLflow does not allow, is written `_at_`.
    """

    package = "mlflow"

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._new_metric, self._client = Metric, MlflowClient()
        if run.tracker_id:
            self.tracker_id = run.tracker_id
            self._client.update_run(self.tracker_id, status="RUNNING")
        else:
            created = self._client.create_run(self._experiment(), run_name=run.name)
            self.tracker_id = created.info.run_id
            parameters = [Param(_valid_name(key), str(value)[:_MAX_LENGTH]) for key, value in leaves(run.settings)]
            for start in range(0, len(parameters), _MAX_PARAMETERS):
                self._client.log_batch(self.tracker_id, params=parameters[start : start + _MAX_PARAMETERS])
        self._is_finished = False

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log finite numbers by key."""
        now = round(1000 * time.time())
        metrics = [self._new_metric(_valid_name(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self.tracker_id, metrics=metrics)

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image: [H, W, 3] uint8."""
        self._client.log_image(self.tracker_id, image, artifact_file=f"{_valid_name(tag)}/step_{step:09d}.png")

    def log_report(self, report: dict[str, Any]) -> None:
        """Log the content of report.json."""
        self._client.log_dict(self.tracker_id, report, "report.json")
        self._is_finished = True

    def close(self) -> None:
        """End the run; one without a report counts as killed."""
        self._client.set_terminated(self.tracker_id, "FINISHED" if self._is_finished else "KILLED")


def _valid_name(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))
