"""Trackers of other projects: the base class, and the run that they track."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from distav.training.trackers.tracker import Tracker


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers get it.

    Attributes:
        name: `run.name`.
        folder: the run directory.
        settings: all settings as nested dictionaries.
        tracker_id: identity of the run in the tracker, which the run directory stores; None for a new run.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    tracker_id: str | None = None


class ExternalTracker(Tracker):
    """A tracker of another project. The constructor opens the run, and continues it if it has a `tracker_id`.

    Attributes:
        package: name of the package that it imports.
        tracker_id: identity of the run in the tracker.
    """

    package: ClassVar[str]
    tracker_id: str

    @abstractmethod
    def __init__(self, run: TrackedRun):
        """Open the run; errors of the package are raised as they are."""
