"""Failures are reported at once, so that the log of a run that is stopped contains them."""

import pytest

_terminal: list[pytest.TerminalReporter] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep the reporter of the main process; workers have none."""
    _terminal[:] = [reporter] if (reporter := config.pluginmanager.getplugin("terminalreporter")) else []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the traceback of a failure."""
    if report.failed and _terminal:
        _terminal[0].write_line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}")
