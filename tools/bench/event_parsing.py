"""Event parsing from weak labels, from pseudo-labels of one teacher per modality, and of fused teachers.

LLP's labels are real, but its features are simulated: each second is the sum of a prototype of every event that is
audible or visible in it, of an unlabeled background, and of noise. Test and validation videos follow their annotations;
training videos, which have only class labels, take the seconds of each class from a validation video.

Legend: N videos, T seconds, C classes, D feature dimension, K backgrounds.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError
from distav.data.annotations.events import events_table, load_events
from distav.data.annotations.llp import CLASSES, DURATION_S, VIDEOS, read_llp
from distav.data.dataset import ShardedDataset
from distav.data.files import write_atomically, write_table
from distav.data.modalities import MODALITIES
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.annotated_videos import FeatureFolder
from distav.data.preparation.sources.llp import LLPSource
from distav.distributed.environment import machine
from distav.evaluation.event_metrics import event_metrics

ROOT = Path(__file__).parents[2]
WIDTH, BACKGROUNDS = 64, 15
NOISE, TEACHER_NOISE = 0.3, 0.12
"""Standard deviation of the noise in each component of a feature and of a teacher's prototypes, which have norm 1."""
METHODS = {"HAN, weak labels": "", "VALOR, fused teachers": "fused", "VALOR, one teacher per modality": "per_modality"}
"""Methods and the pseudo-labels they learn from; empty for none."""
SETTINGS = (
    "model.parser.width=128", "model.parser.heads=4", "model.parser.ffn_dim=256", "optim.lr=1e-3",
    "phases.parse.epochs=12", "run.device=cpu", "run.threads_per_rank=1", "run.log_every=156",
)  # fmt: skip
"""The network is small, in proportion to the features."""


@dataclass(frozen=True)
class FeatureSimulator:
    """Simulates features from prototypes [2, C, D] of each class by modality, and from backgrounds [2, K, D]."""

    prototypes: np.ndarray
    backgrounds: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator) -> "FeatureSimulator":
        """Draw random prototypes and backgrounds."""
        return cls(_unit_vectors(rng, (2, len(CLASSES), WIDTH)), _unit_vectors(rng, (2, BACKGROUNDS, WIDTH)))

    def features(self, events: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return [N, 2, T, D] for events [N, 2, T, C]; half of the videos have a background for some seconds."""
        values = np.einsum("nstc,scd->nstd", events.astype(np.float32), self.prototypes)
        for video in range(len(events)):
            for modality in range(2):
                first, end = np.sort(rng.integers(0, DURATION_S + 1, 2))
                if rng.uniform() < 0.5:
                    values[video, modality, first:end] += self.backgrounds[modality, rng.integers(BACKGROUNDS)]
        return (values + NOISE * rng.standard_normal(values.shape)).astype(np.float32)


def _unit_vectors(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def training_events(weak: np.ndarray, annotated: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return events [N, 2, T, C] in which every class of a video has the seconds of a random annotated video.

    Args:
        weak: [N, C] classes of the videos.
        annotated: [M, 2, T, C] annotated events.
        rng: draws the annotated video.
    """
    events = np.zeros((len(weak), *annotated.shape[1:]), dtype=bool)
    videos_of_class = [np.flatnonzero(annotated[..., label].any(axis=(1, 2))) for label in range(weak.shape[1])]
    for video, label in np.argwhere(weak):
        events[video, :, :, label] = annotated[rng.choice(videos_of_class[label]), :, :, label]
    return events


def pseudo_labels(
    features: np.ndarray, simulator: FeatureSimulator, weak: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return pseudo-labels, filtered by the classes of the video: [N, 2, T, C] bool for `per_modality` and `fused`.

    A teacher scores features with noisy prototypes of the classes. `per_modality` has one teacher for each modality;
    `fused` adds the scores of both and predicts the same events for both.

    Args:
        features: [N, 2, T, D].
        simulator: has the exact prototypes.
        weak: [N, C] classes of the videos.
        rng: draws the noise of the prototypes.
    """
    prototypes = simulator.prototypes + TEACHER_NOISE * rng.standard_normal(simulator.prototypes.shape).astype(
        np.float32
    )
    scores = np.einsum("nstd,scd->nstc", features, prototypes)
    fused = np.broadcast_to(scores.sum(axis=1, keepdims=True), scores.shape)
    all_scores = {"per_modality": scores, "fused": fused}
    return {name: (teacher_scores > 0.5) & weak[:, None, None] for name, teacher_scores in all_scores.items()}


def prepare(annotations: Path, work: Path, seed: int) -> Path:
    """Create the dataset and the pseudo-labels of a seed, unless they exist; returns their directory.

    Raises:
        UserError: if annotations are missing or malformed.
    """
    directory = work / f"seed_{seed}"
    if (directory / "pseudo_labels.json").exists():
        return directory
    rng = np.random.default_rng([seed, 11])
    videos = {split: read_llp(annotations, split) for split in VIDEOS}
    simulator, events = FeatureSimulator.random(rng), {}
    for modality in MODALITIES:
        (directory / modality).mkdir(parents=True, exist_ok=True)
    for split in ("val", "test", "train"):
        annotated = videos[split].events
        if annotated is None:
            annotated = training_events(videos[split].weak, events["val"], rng)
        events[split] = annotated
        for name, features in zip(videos[split].names, simulator.features(annotated, rng), strict=True):
            for modality, values in zip(MODALITIES, features, strict=True):
                np.save(directory / modality / f"{name}.npy", values)
    streams = tuple(FeatureFolder(modality, f"{modality}_features", directory / modality) for modality in MODALITIES)
    build_dataset(
        LLPSource(annotations, features=streams),
        directory / "shards",
        BuildConfig(Encoding(clip_s=DURATION_S)),
        2,
    )
    _write_pseudo_labels(directory, simulator, dict(zip(videos["train"].names, events["train"], strict=True)), rng)
    return directory


def _write_pseudo_labels(
    directory: Path, simulator: FeatureSimulator, events: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    """Write the pseudo-labels of the training videos, and their scores."""
    shards = ShardedDataset.open(directory / "shards")
    split = shards.split("train")
    sources = split.sources.tolist()
    values = np.stack([[np.load(directory / modality / f"{name}.npy") for modality in MODALITIES] for name in sources])
    weak, true = load_events(shards, split).weak, np.stack([events[name] for name in sources])
    scores = {}
    for name, labels in pseudo_labels(values, simulator, weak, rng).items():
        annotated = np.ones(len(split), dtype=bool)
        table = events_table("train", split.keys, split.sources, shards.classes, labels, annotated)
        write_table(directory / f"{name}.parquet", table)
        scores[name] = event_metrics(labels, true)["segment"]
    write_atomically(directory / "pseudo_labels.json", (json.dumps(scores, indent=1) + "\n").encode())


def run(annotations: Path, work: Path, seeds: Sequence[int], max_parallel: int) -> dict[str, Any]:
    """Train every method with every seed, unless its result exists, and return all results.

    Raises:
        UserError: if annotations are missing or a training fails.
    """
    jobs = [(method, seed, prepare(annotations, work, seed)) for seed in seeds for method in METHODS]
    with ThreadPoolExecutor(max_parallel) as pool:
        rows = list(pool.map(lambda job: _train(*job), jobs))
    scores = {seed: json.loads((work / f"seed_{seed}" / "pseudo_labels.json").read_text()) for seed in seeds}
    return {"machine": machine(), "rows": rows, "pseudo_labels": scores}


def _train(method: str, seed: int, directory: Path) -> dict[str, Any]:
    teachers, name = METHODS[method], METHODS[method] or "weak"
    report = directory / "runs" / name / "report.json"
    if not report.exists():
        config = ROOT / "configs" / ("valor.yaml" if teachers else "han.yaml")
        overrides = [f"phases.parse.pseudo_labels={directory / teachers}.parquet"] if teachers else []
        command = [
            sys.executable, str(ROOT / "distav" / "train.py"), "--config", str(config), f"data.root={directory}/shards",
            f"run.root={directory}/runs", f"run.name={name}", f"run.seed={seed}", *SETTINGS, *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"{method}, seed {seed}: training ended with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        print(f"{method}, seed {seed}: finished", flush=True)
    return {"method": method, "seed": seed, **json.loads(report.read_text())["events"]}


def table(results: dict[str, Any]) -> str:
    """Return the scores as a Markdown table: mean and standard deviation over seeds."""
    names = ("audio", "visual", "audio_visual", "type", "event")
    heads = [f"{level} {name}" for level in ("segment", "event") for name in ("A", "V", "AV", "Type@AV", "Event@AV")]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in METHODS:
        rows = [row for row in results["rows"] if row["method"] == method]
        cells = [
            f"{np.mean(values):.1f} ± {np.std(values):.1f}"
            for level in ("segment", "event")
            for name in names
            if (values := [row[level][name] for row in rows])
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    teachers = {"fused": "pseudo-labels, fused teachers", "per_modality": "pseudo-labels, one teacher per modality"}
    for key, title in teachers.items():
        means = [np.mean([scores[key][name] for scores in results["pseudo_labels"].values()]) for name in names]
        lines.append(
            f"| *{title}, training videos* | " + " | ".join(f"{mean:.1f}" for mean in means) + " | " * 5 + " |"
        )
    return "\n".join(lines)
