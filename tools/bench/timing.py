"""Timings side by side, and the table and the JSON object that come of them.

Candidates take turns, so that a machine that slows down slows all of them; a ratio is the median of the ratios of the
rounds. On one thread the clock is the CPU time of the process, which other work on the machine hardly moves; on more
it is the wall clock.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distav.data.files import write_atomically

PACKAGES = (
    "distav",
    "torch",
    "numpy",
    "nvidia-dali-cuda130",
    "deepspeed",
    "webdataset",
    "faiss-cpu",
    "torchcodec",
    "av",
    "cleanlab",
    "scikit-learn",
)


@dataclass(frozen=True)
class Setting:
    """Where and how something is measured."""

    device: torch.device
    threads: int
    rounds: int

    def clock(self) -> float:
        """Return seconds: CPU time on one thread, else wall time; a GPU finishes its work first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def interleaved(self, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Time each candidate once a round, in turn, after one round that does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(self.rounds + 1):
            for name, candidate in candidates.items():
                began = self.clock()
                candidate()
                if number:
                    seconds[name].append(self.clock() - began)
        return seconds


@dataclass
class Results:
    """Figures and ratios of one benchmark."""

    name: str
    arguments: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: dict[str, dict[str, Any]] = field(default_factory=dict)

    def times(self, seconds: Mapping[str, list[float]], per: Mapping[str, tuple[float, str]] | None = None) -> None:
        """Note timings; `per` gives for a name the amount of work in one call and its unit."""
        for name, values in seconds.items():
            figure = {"median_s": statistics.median(values), "min_s": min(values), "rounds": len(values)}
            if per and name in per:
                amount, unit = per[name]
                figure |= {"rate": amount / figure["median_s"], "unit": unit}
            self.figures[name] = figure

    def note(self, name: str, value: float, unit: str) -> None:
        """Note a figure that is no timing."""
        self.figures[name] = {"value": value, "unit": unit}

    def ratio(self, name: str, value: float | tuple[list[float], list[float]], bar: str = "") -> None:
        """Note a ratio, of two timings round by round or given; `bar` is such as "<= 1.25"."""
        if isinstance(value, tuple):
            value = statistics.median(a / b for a, b in zip(*value, strict=True))
        entry: dict[str, Any] = {"value": value}
        if bar:
            sign, limit = bar.split()
            entry |= {"bar": bar, "met": value <= float(limit) if sign == "<=" else value >= float(limit)}
        self.ratios[name] = entry

    def object(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {
            "benchmark": self.name,
            "arguments": self.arguments,
            "machine": machine(),
            "figures": self.figures,
            "ratios": self.ratios,
        }

    def table(self) -> str:
        """Return a table to read."""
        lines = [f"{self.name}: " + " ".join(f"{key}={value}" for key, value in self.arguments.items())]
        for name, figure in self.figures.items():
            if "median_s" in figure:
                rate = f"{figure['rate']:12,.1f} {figure['unit']}" if "rate" in figure else ""
                lines.append(f"  {name:58s}{1000 * figure['median_s']:12.2f} ms{rate}")
            else:
                lines.append(f"  {name:58s}{figure['value']:12.4g} {figure['unit']}")
        for name, ratio in self.ratios.items():
            told = f"   bar {ratio['bar']}: {'met' if ratio['met'] else 'MISSED'}" if "bar" in ratio else ""
            lines.append(f"  {name:58s}{ratio['value']:12.4g}{told}")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write the JSON object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.object(), indent=1) + "\n").encode())


def machine() -> dict[str, Any]:
    """Return what the figures hang on: processor, cores, GPU, versions."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }
