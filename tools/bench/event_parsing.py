"""What harvested labels are worth: events parsed from weak labels, from one teacher a modality, and from fused teachers.

LLP's labels are real; its features here are not: each second is the sum of a prototype of every event that is heard,
or seen, in it, of a background that has no name, and of noise. Test and validation videos follow their annotations;
training videos, which have classes alone, borrow for each class when it is heard and seen from a validation video.
Legend: N videos, T seconds, C classes, D width.
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
from distav.data.preparation.annotated_videos import FeatureFolder
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.llp import LLPSource
from distav.evaluation.event_metrics import event_metrics
from distav.training.environment import machine

ROOT = Path(__file__).parents[2]
WIDTH, BACKGROUNDS = 64, 15
NOISE, TEACHER_NOISE = 0.3, 0.12
"""Standard deviation of each number of a feature, and of a teacher's idea of a class; prototypes have length 1."""
METHODS = {"HAN, weak labels": "", "VALOR, fused teachers": "fused", "VALOR, a teacher a modality": "each"}
SETTINGS = (
    "model.parser.width=128", "model.parser.heads=4", "model.parser.ffn_dim=256", "optim.lr=1e-3",
    "phases.parse.epochs=12", "run.device=cpu", "run.threads_per_rank=1", "run.log_every=156",
)  # fmt: skip
"""The network is small, since the features are."""


@dataclass(frozen=True)
class World:
    """What sounds and pictures of each class are like: [2, C, D], and backgrounds [2, K, D]."""

    prototypes: np.ndarray
    backgrounds: np.ndarray

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "World":
        """Draw directions at random."""
        return cls(_directions(rng, (2, len(CLASSES), WIDTH)), _directions(rng, (2, BACKGROUNDS, WIDTH)))

    def features(self, events: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return [N, 2, T, D] for events [N, 2, T, C]; half of the videos have a background for some seconds."""
        values = np.einsum("nstc,scd->nstd", events.astype(np.float32), self.prototypes)
        for video in range(len(events)):
            for modality in range(2):
                first, end = np.sort(rng.integers(0, DURATION_S + 1, 2))
                if rng.uniform() < 0.5:
                    values[video, modality, first:end] += self.backgrounds[modality, rng.integers(BACKGROUNDS)]
        return (values + NOISE * rng.standard_normal(values.shape)).astype(np.float32)


def _directions(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    drawn = rng.standard_normal(shape)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def training_events(weak: np.ndarray, annotated: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give every class of a video the seconds that it has in some annotated video: [N, C] -> [N, 2, T, C].

    Args:
        weak: [N, C] classes of the videos.
        annotated: [M, 2, T, C] real events to borrow from.
        rng: draws the video that is borrowed from.
    """
    events = np.zeros((len(weak), *annotated.shape[1:]), dtype=bool)
    lenders = [np.flatnonzero(annotated[..., kind].any(axis=(1, 2))) for kind in range(weak.shape[1])]
    for video, kind in np.argwhere(weak):
        events[video, :, :, kind] = annotated[rng.choice(lenders[kind]), :, :, kind]
    return events


def harvested(values: np.ndarray, world: World, weak: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return what teachers say, filtered by the classes of the video: [N, 2, T, C] bool for `each` and `fused`.

    A teacher compares features with its own idea of each class, which is off by some noise. One of each modality knows
    that modality alone; the fused one adds both, and says the same of both.
    """
    ideas = world.prototypes + TEACHER_NOISE * rng.standard_normal(world.prototypes.shape).astype(np.float32)
    scores = np.einsum("nstd,scd->nstc", values, ideas)
    fused = np.broadcast_to(scores.sum(axis=1, keepdims=True), scores.shape)
    return {name: (each > 0.5) & weak[:, None, None] for name, each in (("each", scores), ("fused", fused))}


def prepare(annotations: Path, work: Path, seed: int) -> Path:
    """Make the set and the harvested tables of a seed, where they are not there yet; returns their folder.

    Raises:
        UserError: for annotations that are missing or broken.
    """
    folder = work / f"seed_{seed}"
    if (folder / "harvest.json").exists():
        return folder
    rng = np.random.default_rng([seed, 11])
    told = {split: read_llp(annotations, split) for split in VIDEOS}
    world, events = World.drawn(rng), {}
    for modality in MODALITIES:
        (folder / modality).mkdir(parents=True, exist_ok=True)
    for split in ("val", "test", "train"):
        known = told[split].events
        events[split] = training_events(told[split].weak, events["val"], rng) if known is None else known
        values = world.features(events[split], rng)
        for name, video in zip(told[split].names, values, strict=True):
            for modality, each in zip(MODALITIES, video, strict=True):
                np.save(folder / modality / f"{name}.npy", each)
    streams = tuple(FeatureFolder(modality, f"{modality}_features", folder / modality) for modality in MODALITIES)
    build_dataset(
        LLPSource(annotations, features=streams),
        folder / "shards",
        BuildConfig(Encoding(clip_s=DURATION_S)),
        2,
    )
    _harvest(folder, world, dict(zip(told["train"].names, events["train"], strict=True)), rng)
    return folder


def _harvest(folder: Path, world: World, events: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Let teachers label the training videos, and note how right they are."""
    shards = ShardedDataset.open(folder / "shards")
    split = shards.split("train")
    sources = split.columns["source"].tolist()
    values = np.stack([[np.load(folder / modality / f"{name}.npy") for modality in MODALITIES] for name in sources])
    weak, true = load_events(shards, split).weak, np.stack([events[name] for name in sources])
    quality = {}
    for name, each in harvested(values, world, weak, rng).items():
        looked_at = np.ones(len(split), dtype=bool)
        found = events_table("train", split.keys, split.columns["source"], shards.classes, each, looked_at)
        write_table(folder / f"{name}.parquet", found)
        quality[name] = event_metrics(each, true)["segment"]
    write_atomically(folder / "harvest.json", (json.dumps(quality, indent=1) + "\n").encode())


def run(annotations: Path, work: Path, seeds: Sequence[int], max_parallel: int) -> dict[str, Any]:
    """Train every method on every seed, those left of an earlier call, and return the figures.

    Raises:
        UserError: for missing annotations, or a training that fails.
    """
    jobs = [(method, seed, prepare(annotations, work, seed)) for seed in seeds for method in METHODS]
    with ThreadPoolExecutor(max_parallel) as pool:
        rows = list(pool.map(lambda job: _train(*job), jobs))
    quality = {seed: json.loads((work / f"seed_{seed}" / "harvest.json").read_text()) for seed in seeds}
    return {"machine": machine(), "rows": rows, "harvested": quality}


def _train(method: str, seed: int, folder: Path) -> dict[str, Any]:
    teachers, name = METHODS[method], METHODS[method] or "weak"
    report = folder / "runs" / name / "report.json"
    if not report.exists():
        config = ROOT / "configs" / ("valor.yaml" if teachers else "han.yaml")
        chosen = [f"phases.parse.pseudo_labels={folder / teachers}.parquet"] if teachers else []
        command = [
            sys.executable, str(ROOT / "distav" / "train.py"), "--config", str(config), f"data.root={folder}/shards",
            f"run.root={folder}/runs", f"run.name={name}", f"run.seed={seed}", *SETTINGS, *chosen,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{method}, seed {seed} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        print(f"{method}, seed {seed}: done", flush=True)
    return {"method": method, "seed": seed, **json.loads(report.read_text())["events"]}


def table(found: dict[str, Any]) -> str:
    """Return the figures as a table: mean and standard deviation over the seeds."""
    names = ("audio", "visual", "audio_visual", "type", "event")
    heads = [f"{level} {name}" for level in ("segment", "event") for name in ("A", "V", "AV", "Type@AV", "Event@AV")]
    lines = ["| learnt from | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in METHODS:
        rows = [row for row in found["rows"] if row["method"] == method]
        cells = [
            f"{np.mean(values):.1f} ± {np.std(values):.1f}"
            for level in ("segment", "event")
            for name in names
            if (values := [row[level][name] for row in rows])
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for kind, said in (("fused", "the fused teacher's labels"), ("each", "the labels of a teacher a modality")):
        means = [np.mean([seed[kind][name] for seed in found["harvested"].values()]) for name in names]
        lines.append(f"| *{said}, training videos* | " + " | ".join(f"{mean:.1f}" for mean in means) + " | " * 5 + " |")
    return "\n".join(lines)
