"""Interleaved timing of candidates, and the table and JSON object of the results.

Candidates are timed alternately, so that a slowdown of the machine affects all of them; a ratio is the median of the
ratios of the rounds. With one thread the clock is the CPU time of the process, which other load hardly affects; with
more threads it is the wall clock.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distav.config.errors import UserError
from distav.console import Cell, Styled, format_table
from distav.data.files import write_atomically
from distav.distributed.environment import machine

_TIME_KEYS = ("median_s", "min_s", "rounds", "rate", "unit")
CLOCK_STEP_S = 1e-6
"""Shortest time that is measured; the clock of CPU time may not advance during a short call."""


@dataclass(frozen=True)
class Setting:
    """Device, number of threads and number of rounds of a measurement."""

    device: torch.device
    threads: int
    rounds: int

    def clock(self) -> float:
        """Return seconds: CPU time for one thread, otherwise wall time; a GPU is synchronized first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def interleaved(self, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Return the seconds of each candidate per round; one warm-up round is not counted."""
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for round_index in range(self.rounds + 1):
            for name, candidate in candidates.items():
                started = self.clock()
                candidate()
                if round_index > 0:
                    seconds[name].append(max(self.clock() - started, CLOCK_STEP_S))
        return seconds


@dataclass
class Results:
    """Figures and ratios of one benchmark."""

    name: str
    arguments: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_times(
        self, seconds: Mapping[str, list[float]], work: Mapping[str, tuple[float, str]] | None = None
    ) -> None:
        """Add timings; `work` maps a name to the amount of work in one call and the unit of its rate."""
        for name, values in seconds.items():
            figure = {"median_s": statistics.median(values), "min_s": min(values), "rounds": len(values)}
            if work and name in work:
                amount, unit = work[name]
                figure |= {"rate": amount / figure["median_s"], "unit": unit}
            self.figures[name] = figure

    def add_value(self, name: str, value: float, unit: str) -> None:
        """Add a figure that is not a timing."""
        self.figures[name] = {"value": value, "unit": unit}

    def add_ratio(self, name: str, value: float | tuple[list[float], list[float]], threshold: str = "") -> None:
        """Add a ratio: a number, or two lists of timings that are divided round by round.

        Args:
            name: name of the ratio.
            value: the ratio, or numerators and denominators; the median of their ratios is taken.
            threshold: bound on the ratio, such as "<= 1.25"; empty for none.
        """
        if isinstance(value, tuple):
            value = statistics.median(a / b for a, b in zip(*value, strict=True))
        entry: dict[str, Any] = {"value": value}
        if threshold:
            sign, limit = threshold.split()
            passed = value <= float(limit) if sign == "<=" else value >= float(limit)
            entry |= {"threshold": threshold, "passed": passed}
        self.ratios[name] = entry

    def as_dict(self) -> dict[str, Any]:
        """Return all figures and ratios, with the arguments and the machine, as one JSON object."""
        return {
            "benchmark": self.name,
            "arguments": self.arguments,
            "machine": machine(),
            "figures": self.figures,
            "ratios": self.ratios,
        }

    def table(self) -> str:
        """Return the figures and ratios as tables for stdout."""
        figures: list[tuple[Cell, ...]] = []
        for name, figure in self.figures.items():
            if "median_s" in figure:
                rate = f"{figure['rate']:,.1f} {figure['unit']}" if "rate" in figure else ""
                others = [f"{key}={figure[key]:.4g}" for key in figure if key not in _TIME_KEYS]
                figures.append(
                    (name, f"{1000 * figure['median_s']:.2f}", "ms", " ".join(filter(None, [rate, *others])))
                )
            else:
                figures.append((name, f"{figure['value']:.4g}", figure["unit"], ""))
        ratios: list[tuple[Cell, ...]] = []
        for name, ratio in self.ratios.items():
            outcome: Cell = ""
            if "threshold" in ratio:
                outcome = Styled("passed", "green") if ratio["passed"] else Styled("FAILED", "bold red")
            ratios.append((name, f"{ratio['value']:.4g}", ratio.get("threshold", ""), outcome))
        parts = [f"{self.name}: " + " ".join(f"{key}={value}" for key, value in self.arguments.items())]
        if figures:
            parts.append(format_table(("figure", "value", "unit", "rate"), figures, numbers=("value", "rate")))
        if ratios:
            parts.append(format_table(("ratio", "value", "threshold", "outcome"), ratios, numbers=("value",)))
        return "\n\n".join(parts)

    def save(self, path: Path) -> None:
        """Write the JSON object to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())


def add_timing_options(command: argparse.ArgumentParser, threads: int) -> None:
    """Add the options for threads, rounds, device and JSON file; `threads` is the default."""
    command.add_argument("--threads", type=int, default=threads, help="number of threads of every candidate")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device")
    add_rounds_and_json(command)


def add_rounds_and_json(command: argparse.ArgumentParser) -> None:
    """Add the options for rounds and JSON file."""
    command.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    command.add_argument("--json", type=Path, help="JSON file for all results")


def setting_of(options: argparse.Namespace) -> Setting:
    """Return the setting that the options of `add_timing_options` describe.

    Raises:
        UserError: if PyTorch finds no GPU, or a number is less than 1.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: PyTorch finds no GPU; omit the option to measure on the CPU.")
    for key, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{key.replace('_', '-')}={value}: allowed: 1 or more.")
    return Setting(device, options.threads, options.rounds)
