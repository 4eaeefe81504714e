"""trackio."""

import json
import os
from typing import Any

import numpy as np

from distav.training.trackers.external import ExternalTracker, TrackedRun

DEFAULT_PROJECT = "distav"


class TrackioTracker(ExternalTracker):
    """A run of trackio.

    Project, server and database are those of its environment variables: `TRACKIO_PROJECT` (distav if it is not set),
    `TRACKIO_SERVER_URL`, `TRACKIO_SPACE_ID`, `TRACKIO_DIR`. A run is continued by the names of project and run.
    """

    package = "trackio"

    def __init__(self, run: TrackedRun):
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        stored = json.loads(run.tracker_id) if run.tracker_id else {}
        project = stored.get("project") or os.environ.get("TRACKIO_PROJECT") or DEFAULT_PROJECT
        self._run = trackio.init(
            project=project,
            name=stored.get("name") or run.name,
            config=run.settings,
            resume="allow" if stored else "never",
            embed=False,
        )
        self.tracker_id = json.dumps({"project": project, "name": self._run.name})

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log finite numbers by key."""
        self._run.log(values, step=step)

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Log an image: [H, W, 3] uint8."""
        self._run.log({tag: self._trackio.Image(image)}, step=step)

    def log_report(self, report: dict[str, Any]) -> None:
        """Log the content of report.json as a text `report`."""
        text = f"```json\n{json.dumps(report, indent=1)}\n```"
        self._run.log({"report": self._trackio.Markdown(text)})

    def close(self) -> None:
        """Wait until all values are stored."""
        self._run.finish()
