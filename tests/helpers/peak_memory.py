"""Memory of this process, as the kernel counts it."""

from collections.abc import Callable
from pathlib import Path


def read_status(name: str) -> int:
    """Return a size from the kernel's status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def peak_growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the peak of this process grows during some work."""
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = read_status("VmRSS")
    work()
    return read_status("VmHWM") - before
