"""A run from its first or next phase to its report."""

from pathlib import Path

from distav.config.schema import Config
from distav.data.files import report_os_errors
from distav.data.preparation.quickstart import render_missing_dataset
from distav.distributed.process_group import process_group
from distav.distributed.signals import Interrupted
from distav.training.phases.registry import run_remaining
from distav.training.report import write_report
from distav.training.run_setup import open_run


def train_all_phases(config: Config) -> Interrupted | None:
    """Train with settings, on the ranks that the launcher has started.

    Returns:
        The interruption, if a signal ended the run and a checkpoint is on disk; None if the run is finished.

    Raises:
        UserError: if settings, data or the run directory are invalid.
    """
    with process_group(config.run.device.name, config.run.timeout_s, config.run.threads_per_rank) as world:
        render_missing_dataset(config.data, world)
        try:
            with report_os_errors(Path(config.run.root), disk_only=True), open_run(config, world) as run:
                run_remaining(run)
                write_report(run)
        except Interrupted as interruption:
            return interruption
    return None
