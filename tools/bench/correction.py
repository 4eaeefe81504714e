"""Time, memory and result of a label correction for growing numbers of samples, on features with known truth.

Each correction runs in a process of its own, or one per rank. Features are Gaussian mixtures: the class means lie in a
subspace, and the samples of a class are divided among a few components.
Legend: N samples, n samples of a rank, C classes, D width.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.phases import LabelCorrectionPhase
from distav.data.files import write_atomically
from distav.distributed.collectives import all_gather_variable_rows, local_shard, shard_range
from distav.distributed.environment import machine
from distav.memory.ivf import approximate_neighbors
from distav.memory.knn import nearest_neighbors
from distav.noise.knn_vote import pca_whiten
from distav.noise.label_correction import correct_labels
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace
from tools.bench.multiprocess import run_on_ranks

SUBSPACE, COMPONENTS = 32, 2
"""Dimensions of the class means, and components of a class."""
SPREAD = {"visual": 1.0, "audio": 1.2}
"""Standard deviation of the samples of a component relative to that of the class means, in every dimension."""
COMPONENT_SPREAD = 0.4
"""Standard deviation of the components of a class, in the same units."""
RECALL_QUERIES = 1000
TIMEOUT_S = 7 * 86400
MAX_CPU_RATIO = 1.2
_BLOCK = 4096
"""Samples that are drawn from one seed, so that features do not depend on the number of ranks."""


@dataclass(frozen=True)
class Case:
    """A correction to measure.

    Attributes:
        samples: N.
        ranks: processes, connected by gloo.
        search: exact or ivf.
        probes: lists that ivf probes; 0 for the exact search.
        classes: C.
        dim: D.
        noise: fraction of the labels that are replaced by another class at random.
        mismatch: fraction of the pairs whose audio shows another class.
        threads: threads of each process.
    """

    samples: int
    ranks: int
    search: str
    probes: int
    classes: int
    dim: int
    noise: float
    mismatch: float
    threads: int


@dataclass(frozen=True)
class Truth:
    """Given and true labels, and classes of the audio: [N] int64 each."""

    given: Tensor
    true: Tensor
    audio: Tensor


def draw_truth(case: Case) -> Truth:
    """Return labels of which some are wrong, and pairs of which some are mismatched; labels name the visual class."""
    generator = torch.Generator().manual_seed(1)
    size, num_classes = case.samples, case.classes

    def replaced(classes: Tensor, rate: float) -> Tensor:
        shift = torch.randint(1, num_classes, (size,), generator=generator)
        return torch.where(torch.rand(size, generator=generator) < rate, (classes + shift) % num_classes, classes)

    true = torch.randint(0, num_classes, (size,), generator=generator)
    return Truth(replaced(true, case.noise), true, replaced(true, case.mismatch))


def draw_features(classes: Tensor, case: Case, modality: str, rows: range) -> Tensor:
    """Return the features of some samples: [N] classes -> [n, D] float32; the same for any division of the rows."""
    seed = 1000 * (1 + list(SPREAD).index(modality))
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(case.dim, min(SUBSPACE, case.dim), generator=generator)).Q
    means = torch.randn(case.classes, 1, axes.shape[1], generator=generator)
    components = means + COMPONENT_SPREAD * torch.randn(case.classes, COMPONENTS, axes.shape[1], generator=generator)
    means = (components @ axes.T).flatten(0, 1)
    features = torch.empty(len(rows), case.dim)
    for start in range(rows.start - rows.start % _BLOCK, rows.stop, _BLOCK):
        generator.manual_seed(seed + 1 + start)
        component = torch.randint(0, COMPONENTS, (_BLOCK,), generator=generator)
        noise = torch.randn(_BLOCK, case.dim, generator=generator)
        low, high = max(start, rows.start), min(start + _BLOCK, rows.stop)
        part = slice(low - start, high - start)
        target = features[low - rows.start : high - rows.start]
        target.copy_(means[classes[low:high] * COMPONENTS + component[part]]).add_(noise[part], alpha=SPREAD[modality])
    return features


def measure_rank(case: Case) -> dict[str, Any]:
    """Correct the labels and return the measurements of this rank, with the result of all ranks."""
    torch.set_num_threads(case.threads)
    base = memory_mib("VmRSS")
    truth, rows = draw_truth(case), shard_range(case.samples)
    space = FeatureSpace(
        "features", draw_features(truth.true, case, "visual", rows), draw_features(truth.audio, case, "audio", rows)
    )
    probes = case.probes if case.search == "ivf" else None
    present = torch.ones(case.samples, dtype=torch.bool)
    wall, cpu = time.perf_counter(), time.process_time()
    correction = correct_labels(
        [space],
        truth.given,
        case.classes,
        torch.arange(case.samples),
        {"visual": present, "audio": present},
        VoteSearchSpace(num_probes=probes),
    )
    result = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "base_mib": base,
        "peak_mib": memory_mib("VmHWM"),
    }
    given = local_shard(truth.given)
    corrected = correction.corrected_labels(given, LabelCorrectionPhase.min_change_odds)
    right = [all_gather_variable_rows((labels == local_shard(truth.true)).float()) for labels in (given, corrected)]
    rate, pair_rate = correction.label_rate, correction.pair_rate
    result |= {
        "right_before": float(right[0].mean()),
        "right_after": float(right[1].mean()),
        "noise": float((truth.given != truth.true).float().mean()),
        "noise_estimate": [rate.estimate, rate.ci95_low, rate.ci95_high],
        "mismatch": float((truth.audio != truth.true).float().mean()),
        "mismatch_estimate": [pair_rate.estimate, pair_rate.ci95_low, pair_rate.ci95_high],
        "selected_votes": correction.selected_votes,
    }
    del correction, right
    if probes is not None:
        result["recall"] = recall(space.visual, case, probes)
    return result


def recall(features: Tensor, case: Case, probes: int) -> float:
    """Return the fraction of the exact neighbors of random samples that the approximate search finds."""
    valid, groups = torch.ones(case.samples, dtype=torch.bool), torch.arange(case.samples)
    whitened = pca_whiten(features, local_shard(valid), VoteSearchSpace.num_components, 0.5)
    own, k = shard_range(case.samples), min(max(VoteSearchSpace.num_neighbors), case.samples - 1)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(2))
    queries = own.start + order[: RECALL_QUERIES // case.ranks]
    exact, _ = nearest_neighbors(whitened, k, groups, valid, queries=queries)
    found, _ = approximate_neighbors(whitened, k, groups, valid, probes, queries=queries)
    hits = [float(torch.isin(row, other).float().mean()) for row, other in zip(exact, found, strict=True)]
    return float(all_gather_variable_rows(torch.tensor(hits)).mean())


def memory_mib(name: str) -> float:
    """Return a size from the kernel's status of this process: VmRSS, resident memory, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(case: Case) -> dict[str, Any]:
    """Run a correction in processes of its own; return the figures of `measure_rank`, and sums over ranks."""
    parts = run_on_ranks(case.ranks, measure_rank, case, timeout_s=TIMEOUT_S)
    row = asdict(case) | parts[0]
    row["wall_s"] = max(part["wall_s"] for part in parts)
    row["cpu_s"] = sum(part["cpu_s"] for part in parts)
    row["peak_mib"] = max(part["peak_mib"] for part in parts)
    row["sum_of_peaks_mib"] = sum(part["peak_mib"] for part in parts)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def run(cases: Sequence[Case], path: Path | None) -> dict[str, Any]:
    """Measure the cases; results of other cases that the file has are kept, and it is written after each one.

    Raises:
        UserError: if the file has no results of this benchmark.
    """
    results: dict[str, Any] = {"benchmark": "correction", "machine": machine(), "rows": []}
    if path and path.exists():
        try:
            results["rows"] = json.loads(path.read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--json={path}: no results of this benchmark; choose another file.") from None
    for case in cases:
        row = measure(case)
        keys = asdict(case)
        kept = [other for other in results["rows"] if any(other[key] != keys[key] for key in keys)]
        order = ("search", "probes", "ranks", "threads", "classes", "samples")
        results["rows"] = sorted([*kept, row], key=lambda row: [row[key] for key in order])
        print(table({"rows": [row]}), flush=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    return results


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent a of values proportional to sizes^a, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(results: dict[str, Any]) -> str:
    """Return the measurements as a Markdown table."""
    head = (
        "search", "ranks", "samples", "wall time", "CPU time of all ranks", "peak memory of a rank", "labels right",
        "label noise", "mismatched pairs", "recall of neighbors",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        cells = (
            f"{row['search']}, {row['probes']} probes" if row["probes"] else row["search"],
            str(row["ranks"]),
            f"{row['samples']:,}",
            f"{row['wall_s']:,.0f} s",
            f"{row['cpu_s']:,.0f} s",
            f"{row['peak_mib'] / 1024:.2f} GiB",
            f"{row['right_before']:.1%} → {row['right_after']:.1%}",
            _estimate(row["noise"], row["noise_estimate"]),
            _estimate(row["mismatch"], row["mismatch_estimate"]),
            f"{row['recall']:.1%}" if "recall" in row else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _estimate(true: float, estimate: Sequence[float]) -> str:
    return f"{true:.1%}: {estimate[0]:.1%} ({estimate[1]:.1%} to {estimate[2]:.1%})"


def scaling_table(results: dict[str, Any]) -> str:
    """Return the fitted exponents, and the CPU time of several ranks relative to one process, as a Markdown table.

    It is empty if the results have neither several sizes nor several ranks.
    """
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        series.setdefault((row["search"], row["probes"], row["ranks"], row["threads"], row["classes"]), []).append(row)
    lines: list[str] = []
    for (search, _, ranks, _, _), rows in series.items():
        sizes = [row["samples"] for row in rows]
        if len(sizes) < 2:
            continue
        name = (
            f"{search}, {ranks} ranks, {sizes[0]:,} to {sizes[-1]:,} samples"
            if ranks > 1
            else (f"{search}, {sizes[0]:,} to {sizes[-1]:,} samples")
        )
        last = exponent(sizes[-2:], [row["cpu_s"] for row in rows[-2:]])
        growth = [row["peak_mib"] - row["base_mib"] for row in rows]
        lines.append(f"| {name}: exponent of the CPU time | {exponent(sizes, [row['cpu_s'] for row in rows]):.2f} | |")
        lines.append(f"| {name}: exponent of the CPU time, last two sizes | {last:.2f} | |")
        lines.append(
            f"| {name}: exponent of the memory above that of the libraries | {exponent(sizes, growth):.2f} | |"
        )
    single = {(row["search"], row["probes"], row["samples"]): row for row in results["rows"] if row["ranks"] == 1}
    for row in results["rows"]:
        base = single.get((row["search"], row["probes"], row["samples"]))
        if row["ranks"] > 1 and base is not None:
            ratio = row["cpu_s"] / base["cpu_s"]
            outcome = "passed" if ratio <= MAX_CPU_RATIO else "**FAILED**"
            title = f"{row['search']}, {row['samples']:,} samples: CPU time of {row['ranks']} ranks / of one process"
            lines.append(f"| {title} | {ratio:.2f} | <= {MAX_CPU_RATIO}, {outcome} |")
    return "\n".join(["| measurement | value | threshold |", "|---|---|---|", *lines]) if lines else ""
