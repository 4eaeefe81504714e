"""Families of problems: ranges of the parameters, from which a Latin hypercube draws the problems of a seed."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from scipy.stats import qmc

from distav.config.errors import UserError, did_you_mean, format_list
from tools.bench.coverage.problem import CoverageProblem, ModalityModel

Range = tuple[float, float]
STRENGTHS: dict[str, Range] = {"none": (0, 0), "weak": (1.5, 3), "medium": (3, 5), "strong": (5, 10)}
"""Separability of the classes in a modality."""
ALL_STRENGTHS = (
    ("strong", "strong"),
    ("strong", "weak"),
    ("weak", "strong"),
    ("medium", "medium"),
    ("strong", "medium"),
    ("medium", "weak"),
)
"""Visual and audio strength, used in turn."""
MIN_SAMPLES_PER_CLASS = 8
MAX_RATES = {"symmetric": 0.8, "prior": 0.6, "next": 0.45, "confusable": 0.4, "matrix": 0.5, "instance": 0.4}
"""Largest rates at which most labels of a class, or of an area of the features, may still be right."""
NOISE_PEAKS = (0.45, 0.95)
MAX_RATE_OF_PEAK = 0.8
"""Largest rate of "instance" noise relative to its peak."""
MAX_RELATIVE_RATE = 0.89
"""Largest rate of symmetric noise relative to that of random labels, (C - 1) / C."""
NOISE_FREE_FRACTION = 0.1
"""Fraction of the problems of a family without label noise."""
MATCHED_FRACTION = 0.35
"""Fraction of the problems of a family without mismatched pairs, where the family has problems with and without."""


@dataclass(frozen=True)
class Family:
    """Ranges of the parameters of a family; sizes are drawn on a logarithmic scale.

    Attributes:
        count: number of problems.
        samples, classes: ranges of N and C.
        noises: label noises, used in turn.
        label_noise_rate, pair_noise: ranges of the rates.
        min_matched: fraction of the problems without mismatched pairs.
        strengths: visual and audio strength, used in turn.
        zipf, open_set_rate, clips_per_source: ranges.
        owners: modalities that own the labels, used in turn.
    """

    count: int
    samples: Range = (500, 2500)
    classes: Range = (3, 20)
    noises: Sequence[str] = ("symmetric",)
    label_noise_rate: Range = (0.05, 0.8)
    pair_noise: Range = (0.05, 0.5)
    min_matched: float = MATCHED_FRACTION
    strengths: Sequence[tuple[str, str]] = ALL_STRENGTHS
    zipf: Range = (0, 0)
    open_set_rate: Range = (0, 0)
    clips_per_source: Range = (1, 1)
    owners: Sequence[str] = ("visual",)


FAMILIES = {
    "symmetric": Family(36),
    "asymmetric": Family(30, noises=("next", "confusable", "matrix")),
    "instance": Family(24, noises=("instance",)),
    "long_tail": Family(24, noises=("symmetric", "prior", "matrix"), label_noise_rate=(0.05, 0.6), zipf=(0.5, 1.4)),
    "many_classes": Family(16, samples=(900, 3000), classes=(60, 300), noises=("symmetric", "confusable")),
    "few_samples": Family(24, samples=(300, 600), classes=(2, 30), noises=("symmetric", "matrix")),
    "large": Family(
        16, samples=(8000, 14000), classes=(5, 40), noises=("symmetric", "matrix", "instance", "confusable")
    ),
    "pairs": Family(30, pair_noise=(0.1, 0.6), min_matched=0.0, label_noise_rate=(0.05, 0.6)),
    "visual_only_signal": Family(
        18, noises=("symmetric", "matrix"), strengths=(("strong", "none"), ("medium", "none"), ("weak", "none"))
    ),
    "audio_only_signal": Family(
        18, noises=("symmetric", "matrix"), strengths=(("none", "strong"), ("none", "medium"), ("none", "weak"))
    ),
    "no_signal": Family(15, noises=("symmetric", "matrix", "prior"), strengths=(("none", "none"),), zipf=(0, 1)),
    "weak": Family(18, noises=("symmetric", "matrix", "next"), strengths=(("weak", "weak"),)),
    "open_set": Family(18, noises=("symmetric", "confusable"), label_noise_rate=(0.05, 0.5), open_set_rate=(0.02, 0.2)),
    "grouped": Family(
        20, samples=(700, 3000), noises=("symmetric", "matrix"), label_noise_rate=(0.05, 0.6), clips_per_source=(1.5, 6)
    ),
    "owner": Family(
        20, noises=("symmetric", "matrix"), label_noise_rate=(0.05, 0.6), min_matched=0.2, owners=("audio", "either")
    ),
}
LARGEST = ((50_000, 20), (20_000, 100), (20_000, 10))
"""N and C of the first problems of the family "large"."""
COLUMNS = (
    "samples", "classes", "rate", "pairs", "visual", "audio", "visual_width", "audio_width", "visual_rank",
    "audio_rank", "visual_groups", "audio_groups", "spread", "freedom", "variation", "coupling", "outliers", "zipf",
    "open", "clips", "softness", "clean", "matched", "option",
)  # fmt: skip
"""Dimensions of the Latin hypercube; "option" is for parameters that a single family or noise has."""


def problems(seed: int = 0, families: Iterable[str] = ()) -> list[CoverageProblem]:
    """Return the problems of a seed; other seeds have other parameters and other samples.

    Args:
        seed: seed.
        families: names of families; empty for all.

    Raises:
        UserError: for an unknown family.
    """
    names = list(families) or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"--family={name}: allowed: {format_list(FAMILIES, 20)}.{did_you_mean(name, FAMILIES)}")
    return [problem for name in names for problem in _problems_of(name, FAMILIES[name], seed)]


def _problems_of(name: str, family: Family, seed: int) -> list[CoverageProblem]:
    rng = np.random.default_rng([seed, crc32(name.encode())])
    points = qmc.LatinHypercube(len(COLUMNS), rng=rng).random(family.count)
    seeds = rng.integers(0, 2**31, family.count)
    return [
        _problem(name, family, index, dict(zip(COLUMNS, point, strict=True)), int(problem_seed))
        for index, (point, problem_seed) in enumerate(zip(points.tolist(), seeds, strict=True))
    ]


def _problem(name: str, family: Family, index: int, at: dict[str, float], seed: int) -> CoverageProblem:
    """Return a problem from its position in the Latin hypercube, 0..1 in each dimension."""
    num_samples = round(_logarithmic(family.samples, at["samples"]))
    largest_classes = min(family.classes[1], num_samples / MIN_SAMPLES_PER_CLASS)
    num_classes = round(_logarithmic((family.classes[0], largest_classes), at["classes"]))
    if name == "large" and index < len(LARGEST):
        num_samples, num_classes = LARGEST[index]
    noise = family.noises[index % len(family.noises)]
    # The strengths change with each pass over the noises, so that all combinations occur.
    strength = family.strengths[(index + index // _period(family)) % len(family.strengths)]
    low, high = family.label_noise_rate
    rate = _linear((low, min(high, MAX_RATES[noise])), at["rate"])
    if noise in ("symmetric", "matrix", "next"):
        rate = min(rate, MAX_RELATIVE_RATE * (num_classes - 1) / num_classes * (1 if noise == "symmetric" else 0.6))
    if noise == "instance":
        rate = min(rate, MAX_RATE_OF_PEAK * _linear(NOISE_PEAKS, at["option"]))
    return CoverageProblem(
        name=f"{name}-{index:02d}",
        family=name,
        seed=seed,
        num_samples=num_samples,
        num_classes=num_classes,
        zipf=_linear(family.zipf, at["zipf"]),
        visual=_modality("visual", STRENGTHS[strength[0]], at),
        audio=_modality("audio", STRENGTHS[strength[1]], at),
        group_coupling=(0.0, 0.5, 1.0)[int(3 * at["coupling"])],
        outlier_rate=max(0.0, _linear((-0.05, 0.05), at["outliers"])),
        label_noise=noise,
        label_noise_rate=0.0 if at["clean"] < NOISE_FREE_FRACTION else rate,
        noise_modality="audio" if index % 3 == 2 else "visual",
        noise_peak=_linear(NOISE_PEAKS, at["option"]),
        noise_softness=_logarithmic((0.03, 0.3), at["softness"]),
        pair_noise=0.0 if at["matched"] < family.min_matched else _linear(family.pair_noise, at["pairs"]),
        open_set_rate=_linear(family.open_set_rate, at["open"]),
        clips_per_source=_linear(family.clips_per_source, at["clips"]),
        has_shared_errors=family.clips_per_source[1] > 1 and at["option"] < 0.5,
        owner=family.owners[index % len(family.owners)],
    )


def _period(family: Family) -> int:
    """Return the number of problems after which noises and strengths repeat."""
    return int(np.lcm(len(family.noises), len(family.strengths)))


def _modality(name: str, strength: Range, at: dict[str, float]) -> ModalityModel:
    return ModalityModel(
        width=(16, 32, 64, 128)[int(4 * at[f"{name}_width"])],
        rank=round(_logarithmic((6, 16), at[f"{name}_rank"])),
        separability=_linear(strength, at[name]),
        num_groups=1 + int(6 * at[f"{name}_groups"]),
        group_spread=_linear((0.1, 0.8), at["spread"]),
        degrees_of_freedom=_logarithmic((3, 30), at["freedom"]),
        variation=_linear((0.0, 0.4), at["variation"]),
    )


def _linear(bounds: Range, position: float) -> float:
    return bounds[0] + position * (bounds[1] - bounds[0])


def _logarithmic(bounds: Range, position: float) -> float:
    return float(bounds[0] * (bounds[1] / bounds[0]) ** position)


def subset(
    all_problems: Sequence[CoverageProblem], number: int, max_work: float = float("inf")
) -> list[CoverageProblem]:
    """Return a number of problems, taken from the families in turn.

    Args:
        all_problems: problems of any families.
        number: number of problems.
        max_work: largest N (60 + C), which is about proportional to the time; a family of larger problems alone has its
            smallest problem.
    """
    by_family: dict[str, list[CoverageProblem]] = {}
    for problem in all_problems:
        by_family.setdefault(problem.family, []).append(problem)
    for family, members in by_family.items():
        small = [problem for problem in members if work(problem) <= max_work]
        by_family[family] = small or [min(members, key=work)]
    turns = itertools.zip_longest(*by_family.values())
    in_turn = [problem.name for turn in turns for problem in turn if problem]
    chosen = set(in_turn[:number])
    return [problem for problem in all_problems if problem.name in chosen]


def work(problem: CoverageProblem) -> float:
    """Return a number that is about proportional to the time of a correction."""
    return problem.num_samples * (60 + problem.num_classes)


PROBLEMS = problems()
"""The problems of seed 0."""
