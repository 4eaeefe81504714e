"""Failures are reported at once, so that the log of a run that is stopped contains them."""

import pytest


class FailureReports:
    """Plugin that writes the traceback of a failure when it is known, in the process that writes the results."""

    def __init__(self, terminal: pytest.TerminalReporter):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the traceback of a failed test."""
        if report.failed:
            self.terminal.write_line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Register the plugin; workers have no terminal."""
    if terminal := session.config.pluginmanager.getplugin("terminalreporter"):
        session.config.pluginmanager.register(FailureReports(terminal))
