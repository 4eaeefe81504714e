"""Samples of a synthetic problem from its seed."""

import numpy as np
import torch

from distav.data.preparation.noise_injection import mismatch_pairs
from tools.bench.coverage.features import Mixture, draw_mixture, draw_points, embed
from tools.bench.coverage.labels import LabelDraws, corrupt
from tools.bench.coverage.problem import CoverageData, CoverageProblem

MIN_CLASS_SIZE = 3
"""Smallest number of sources of a class, before some of them become open-set."""
MAX_OPEN_SET_CLUSTERS = 8


def generate(problem: CoverageProblem) -> CoverageData:
    """Draw the samples of a problem; the same problem has the same samples."""
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(problem.seed).spawn(6)]
    sources = _draw_sources(problem, streams[0])
    source_class = _draw_classes(problem, int(sources.max()) + 1, streams[0])
    visual_group, audio_group = _draw_groups(problem, len(source_class), streams[1])
    num_mixtures = problem.num_classes + _num_clusters(problem)
    mixtures = {
        "visual": draw_mixture(problem.visual, num_mixtures, streams[2]),
        "audio": draw_mixture(problem.audio, num_mixtures, streams[3]),
    }
    pair_id = mismatch_pairs(problem.num_samples, problem.pair_noise, streams[4])
    arguments = sources, problem.outlier_rate
    points = {
        "visual": draw_points(problem.visual, mixtures["visual"], source_class, visual_group, *arguments, streams[2]),
        "audio": draw_points(problem.audio, mixtures["audio"], source_class, audio_group, *arguments, streams[3])[
            pair_id
        ],
    }
    visual_class = source_class[sources]
    audio_class = visual_class[pair_id]
    true = _owned_class(problem, visual_class, audio_class, streams[5])
    given = _draw_labels(problem, true, sources, mixtures, points, streams[5])
    return CoverageData(
        num_classes=problem.num_classes,
        visual=torch.from_numpy(embed(mixtures["visual"], points["visual"], streams[2])),
        audio=torch.from_numpy(embed(mixtures["audio"], points["audio"], streams[3])),
        given=given,
        true=true,
        visual_class=visual_class,
        audio_class=audio_class,
        pair_id=pair_id,
        groups=sources,
    )


def class_frequencies(problem: CoverageProblem) -> np.ndarray:
    """Return the class frequencies, rank^-zipf: [C]."""
    weights = np.arange(1, problem.num_classes + 1) ** -problem.zipf
    return weights / weights.sum()


def _draw_sources(problem: CoverageProblem, rng: np.random.Generator) -> np.ndarray:
    """Return the source of each sample, numbered without gaps: [N] int64."""
    num_sources = max(2, round(problem.num_samples / problem.clips_per_source))
    if num_sources >= problem.num_samples:
        return np.arange(problem.num_samples)
    return np.unique(rng.integers(0, num_sources, problem.num_samples), return_inverse=True)[1]


def _draw_classes(problem: CoverageProblem, num_sources: int, rng: np.random.Generator) -> np.ndarray:
    """Return the class of each source, in random order: [S] int64; open-set sources have a class of C or larger."""
    counts = np.maximum(class_frequencies(problem) * num_sources, MIN_CLASS_SIZE)
    bounds = np.round(counts.cumsum() / counts.sum() * num_sources).astype(np.int64)
    classes = rng.permutation(np.searchsorted(bounds, np.arange(num_sources), side="right"))
    is_open = rng.random(num_sources) < problem.open_set_rate
    clusters = problem.num_classes + rng.integers(0, max(1, _num_clusters(problem)), num_sources)
    return np.where(is_open, clusters, classes)


def _num_clusters(problem: CoverageProblem) -> int:
    """Return the number of clusters of open-set samples."""
    return min(MAX_OPEN_SET_CLUSTERS, 1 + problem.num_classes // 4) if problem.open_set_rate > 0 else 0


def _draw_groups(problem: CoverageProblem, num_sources: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the visual and audio group of each source: [S] int64 twice."""
    visual = rng.integers(0, problem.visual.num_groups, num_sources)
    audio = rng.integers(0, problem.audio.num_groups, num_sources)
    is_coupled = rng.random(num_sources) < problem.group_coupling
    return visual, np.where(is_coupled, visual % problem.audio.num_groups, audio)


def _owned_class(
    problem: CoverageProblem, visual_class: np.ndarray, audio_class: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the class of the modality that owns the label of each sample: [N] int64."""
    if problem.owner == "either":
        return np.where(rng.random(len(visual_class)) < 0.5, visual_class, audio_class)
    return (audio_class if problem.owner == "audio" else visual_class).copy()


def _draw_labels(
    problem: CoverageProblem,
    true: np.ndarray,
    sources: np.ndarray,
    mixtures: dict[str, Mixture],
    points: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the given labels: [N] int64; see `corrupt`."""
    num_classes = problem.num_classes
    draws = LabelDraws(rng.random(len(true)), rng.random(len(true)))
    if problem.has_shared_errors:
        draws = LabelDraws(draws.error[sources], draws.label[sources])
    centers = [mixture.centers[:num_classes].mean(1) for mixture in mixtures.values()]
    distances = None
    if problem.label_noise == "instance":
        distances = mixtures[problem.noise_modality].class_distances(points[problem.noise_modality], num_classes)
    frequencies = class_frequencies(problem)
    return corrupt(problem, true, frequencies, np.concatenate(centers, axis=1), distances, draws, rng)
