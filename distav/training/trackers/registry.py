"""Trackers by name: checks before a run, and opening."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.files import write_atomically
from distav.training.trackers.background import BackgroundTracker, LoggedSteps
from distav.training.trackers.external import ExternalTracker, TrackedRun
from distav.training.trackers.mlflow_tracker import MlflowTracker
from distav.training.trackers.tracker import Tracker
from distav.training.trackers.trackio_tracker import TrackioTracker
from distav.training.trackers.wandb_tracker import WandbTracker

TRACKERS: dict[str, type[ExternalTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker, "trackio": TrackioTracker}
"""Trackers by the names of `monitor.trackers`."""
KEY = "monitor.trackers"


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and that their packages are installed.

    Raises:
        UserError: naming the setting, what is allowed and what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"{KEY}={name}: allowed: {format_list(TRACKERS)}.{did_you_mean(name, TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            raise UserError(
                f"{KEY}={name}: the package {TRACKERS[name].package} is not installed; run pip install "
                f"'distav[{name}]', or remove {name}."
            )
    if len(set(names)) < len(names):
        raise UserError(f"{KEY}={list(names)}: a tracker is named twice; name each one once.")


def open_trackers(names: Sequence[str], run: TrackedRun, warn: Callable[[str], None]) -> list[Tracker]:
    """Open a run in trackers, or continue it, if the run directory has its identity.

    Args:
        names: names of trackers.
        run: the run; its `tracker_id` is not used.
        warn: logs a warning.

    Raises:
        UserError: if a new run cannot be opened. If an interrupted run cannot be continued, there is a warning, and
            the tracker is not used.
    """
    opened: list[Tracker] = []
    for name in names:
        folder = run.folder / "trackers"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.id"
        tracker_id = path.read_text() if path.exists() else None
        try:
            tracker = TRACKERS[name](replace(run, tracker_id=tracker_id))
        except Exception as error:  # Of any library.
            message = f"{KEY}: {name} could not be opened ({type(error).__name__}: {error})."
            if tracker_id is None:
                for other in opened:
                    other.close()
                raise UserError(
                    f"{message} Check its environment variables, see configs/README.md, or remove {name}."
                ) from error
            warn(f"{message} It gets no values until the run is resumed again.")
            continue
        write_atomically(path, tracker.tracker_id.encode())
        opened.append(BackgroundTracker(name, tracker, LoggedSteps(folder / f"{name}.steps.jsonl"), warn))
    return opened
