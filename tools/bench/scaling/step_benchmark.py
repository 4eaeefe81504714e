"""Comparison of predicted and measured steps of 1, 2 and 4 ranks on this machine.

The constants of a prediction come from other measurements: steps of one rank, alone and beside runs that it does not
communicate with, single collectives, and a copy in memory. Nothing is fitted to steps of several ranks.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from distav.distributed.environment import machine
from tools.bench.loader import make_clips
from tools.bench.scaling import gloo
from tools.bench.scaling.collectives import StepShape, sent_bytes, shape_of, step_collectives
from tools.bench.scaling.measured_steps import MEASURED_STEPS, RankTimes, measure, relative_spread, step_settings
from tools.bench.scaling.network import Network, wire_bytes
from tools.bench.scaling.step_time import Compute, Machine, predict_step

RANKS = (1, 2, 4)
CLIPS = 96
AUDIO_S, SAMPLE_RATE_HZ = 1.0, 8000
"""Length of the audio of the measured steps, and the sample rate of the clips."""
COPIED_BYTES = 2**26


@dataclass(frozen=True)
class Case:
    """Settings of measured steps.

    Attributes:
        name: name in tables.
        overrides: settings, as `key=value`.
    """

    name: str
    overrides: tuple[str, ...]


CASES = (
    Case("ZeRO 0, sharded memory bank", ("deepspeed.zero_stage=0", "memory_bank.replicate_below_mib=0")),
    Case("ZeRO 1, replicated memory bank", ("deepspeed.zero_stage=1",)),
)


@dataclass
class Measurements:
    """Shortest times over the rounds, in seconds; other load has disturbed them least.

    Attributes:
        alone: steps of one rank by case, from which predictions are made.
        jitter: relative standard deviation of these steps.
        beside: steps of one rank by the number of runs at the same time.
        copy_s: copy of `COPIED_BYTES` bytes.
        points: times of collectives.
        steps: measured steps by case and number of ranks.
        busy_cores: cores that the ranks kept busy during these steps.
        recorded: collectives of a step by case and number of ranks, by kind and size.
        dataset: clips and classes of the dataset.
    """

    alone: dict[str, Compute]
    jitter: dict[str, float]
    beside: dict[int, float]
    copy_s: float
    points: list[gloo.CollectiveTime]
    steps: dict[tuple[str, int], float]
    busy_cores: dict[tuple[str, int], float]
    recorded: dict[tuple[str, int], Counter[tuple[str, int]]]
    dataset: tuple[int, int]


def take(clips: int, rounds: int, report: Callable[[str], None] = print) -> Measurements:
    """Measure all constants and all steps; each round measures everything once.

    Args:
        clips: clips of a rank and step.
        rounds: number of rounds.
        report: called with a line about each finished round.
    """
    first, parts = CASES[0], []
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as directory:
        dataset = Path(directory) / "dataset"
        make_clips(dataset, max(CLIPS, clips * max(RANKS)))
        for number in range(rounds):
            began = time.monotonic()
            beside = {runs: measure(dataset, clips, 1, first.overrides, runs) for runs in RANKS}
            alone = {case.name: measure(dataset, clips, 1, case.overrides)[0][0] for case in CASES[1:]}
            alone[first.name] = beside[1][0][0]
            points = gloo.measure()
            steps = {
                (case.name, ranks): measure(dataset, clips, ranks, case.overrides)[0]
                for case in CASES
                for ranks in RANKS
            }
            parts.append((alone, beside, _copy_s(), points, steps))
            report(f"round {number + 1} of {rounds}: {time.monotonic() - began:.0f} s")
    return _combine(parts)


def _combine(rounds: Sequence[tuple[dict, dict, float, list, dict]]) -> Measurements:
    alone, beside, copies, points, steps = zip(*rounds, strict=True)
    shortest = {name: min((found[name] for found in alone), key=_step_s) for name in alone[0]}
    least = {key: min((found[key] for found in steps), key=_mean_step_s) for key in steps[0]}
    some = next(iter(steps[0].values()))[0]
    return Measurements(
        alone={name: Compute(**times.parts) for name, times in shortest.items()},
        jitter={name: min(relative_spread(found[name].seconds) for found in alone) for name in alone[0]},
        beside={runs: min(fmean(_step_s(run[0]) for run in found[runs]) for found in beside) for runs in beside[0]},
        copy_s=min(copies),
        points=gloo.fastest(points),
        steps={key: _mean_step_s(ranks) for key, ranks in least.items()},
        busy_cores={key: sum(rank.cpu_s for rank in ranks) / _mean_step_s(ranks) for key, ranks in least.items()},
        recorded={key: steps[0][key][0].collectives for key in steps[0]},
        dataset=(some.rows, some.classes),
    )


def _step_s(times: RankTimes) -> float:
    return median(times.seconds)


def _mean_step_s(ranks: Sequence[RankTimes]) -> float:
    return fmean(map(_step_s, ranks))


def _copy_s() -> float:
    values = torch.ones(COPIED_BYTES // 4)
    copies, seconds = torch.empty_like(values), []
    for _ in range(7):
        started = time.perf_counter()
        copies.copy_(values)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def shape_of_case(case: Case, clips: int, dataset: tuple[int, int]) -> StepShape:
    """Return the shape of the measured steps of a case.

    Args:
        case: the case.
        clips: clips of a rank and step.
        dataset: clips and classes of the dataset.
    """
    settings = step_settings(Path("."), clips, 1, (*case.overrides, f"data.audio_s={AUDIO_S}"), Path("."))
    return shape_of(settings, clips, *dataset, SAMPLE_RATE_HZ)


def evaluate(found: Measurements, clips: int, cores: int) -> dict[str, Any]:
    """Fit the constants, predict every measured step, and return all of it as a JSON object.

    Args:
        found: measurements.
        clips: clips of a rank and step.
        cores: cores of the machine.
    """
    networks = gloo.fit(found.points, cores)
    errors = gloo.relative_errors(networks, found.points, cores)
    rows = []
    for case in CASES:
        shape = shape_of_case(case, clips, found.dataset)
        for ranks in RANKS:
            nodes = _machine(networks, found, case, ranks, cores)
            terms = predict_step(found.alone[case.name], shape, nodes, ranks)
            predicted, measured = sum(terms.values()), found.steps[case.name, ranks]
            collectives, recorded = step_collectives(shape, ranks), found.recorded[case.name, ranks]
            rows.append(
                {
                    "case": case.name,
                    "ranks": ranks,
                    "measured_s": measured,
                    "predicted_s": predicted,
                    "error": predicted / measured - 1,
                    "terms": terms,
                    "busy_cores": found.busy_cores[case.name, ranks],
                    "collectives": sum(item.count for item in collectives),
                    "recorded_collectives": sum(recorded.values()),
                    "sent_bytes": sent_bytes(collectives, ranks),
                    "recorded_bytes": recorded_bytes(recorded, ranks),
                }
            )
    return {
        "machine": machine(),
        "arguments": {"clips": clips, "steps": MEASURED_STEPS, "cores": cores},
        "alone": {name: asdict(compute) for name, compute in found.alone.items()},
        "jitter": found.jitter,
        "beside": {str(runs): seconds for runs, seconds in found.beside.items()},
        "memory_bandwidth": 2 * COPIED_BYTES / found.copy_s,
        "networks": gloo.as_dict(networks),
        "network_errors": {"median": median(errors), "largest": max(errors)},
        "points": [asdict(point) for point in found.points],
        "rows": rows,
    }


def _machine(networks: Mapping[str, Network], found: Measurements, case: Case, ranks: int, cores: int) -> Machine:
    shared = {kind: gloo.shared(network, ranks, cores) for kind, network in networks.items()}
    return Machine(
        networks=shared,
        control=shared["all_reduce"],
        cores_per_node=cores,
        slowdowns={runs: seconds / found.beside[1] for runs, seconds in found.beside.items()},
        memory_bandwidth=2 * COPIED_BYTES / found.copy_s,
        jitter=found.jitter[case.name],
    )


def recorded_bytes(recorded: Mapping[tuple[str, int], int], ranks: int) -> float:
    """Return the bytes that a rank sends for recorded collectives, if all of them use rings or pairwise exchanges."""
    return sum(count * wire_bytes(kind, num_bytes, ranks) for (kind, num_bytes), count in recorded.items())


def run(clips: int, rounds: int) -> dict[str, Any]:
    """Measure, fit and predict; see `take` for the arguments and `evaluate` for the result."""
    cores = len(os.sched_getaffinity(0))
    record = evaluate(take(clips, rounds), clips, cores)
    record["arguments"]["rounds"] = rounds
    return record
