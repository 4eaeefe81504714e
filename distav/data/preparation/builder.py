"""Build a dataset from the candidates of a source, in two steps that can be interrupted and resumed.

First, worker processes encode chunks of candidates into the work directory `.work`. Then the clips are shuffled,
numbered and copied into shards; a shard is complete when it has its final name. Random numbers depend only on the seed
and the position of a candidate, so the resulting bytes do not depend on the number of workers, machines or restarts.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError
from distav.data.annotations.events import events_table
from distav.data.dataset import EVENTS, member_extensions
from distav.data.files import write_table
from distav.data.manifest import FORMAT
from distav.data.preparation.encode_workers import ChunkSubset, EncodedClip, count_complete_chunks, encode_all
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.noise_injection import LabelNoise, flip_labels, mismatch_pairs
from distav.data.preparation.output_dir import (
    WORK,
    BuildResult,
    claim_work_dir,
    make_recipe,
    read_result,
    write_index,
    write_manifest,
    write_rejected,
)
from distav.data.preparation.shard_writer import SplitWriter, sample_keys
from distav.data.preparation.source import LABEL_SEPARATOR, AnnotatedSource, Source, SourceInfo

CHUNK = 64
"""Candidates per chunk."""


@dataclass(frozen=True)
class BuildConfig:
    """Everything besides the source that determines the bytes of a dataset.

    Attributes:
        encoding: how clips are stored.
        seed: seed of order, noise and rendering.
        shard_samples: samples per shard.
        label_noise: label noise of the training split; None: none.
        correspondence_noise: fraction of training clips with the audio of another clip.
        cross_class_only: whether audio is swapped only between clips of different classes.
    """

    encoding: Encoding
    seed: int = 0
    shard_samples: int = 1000
    label_noise: LabelNoise | None = None
    correspondence_noise: float = 0.0
    cross_class_only: bool = False

    def __post_init__(self) -> None:
        if self.shard_samples < 1:
            raise UserError(f"--shard-samples={self.shard_samples}: has to be 1 or more.")
        if not 0 <= self.correspondence_noise <= 1:
            raise UserError(f"--correspondence-noise={self.correspondence_noise}: has to be a rate from 0 to 1.")


def build_dataset(
    source: Source, out: Path, config: BuildConfig, workers: int, part: ChunkSubset | None = None
) -> BuildResult:
    """Write a dataset to a directory, or resume an interrupted build.

    Args:
        source: provides the clips.
        out: directory of the dataset.
        config: encoding, noise and seed.
        workers: number of encoding processes.
        part: only encode these chunks; a later call without `part` writes the dataset.

    Raises:
        UserError: if the directory contains another dataset, or if no candidate could be used.
    """
    recipe = make_recipe(source, config)
    try:
        return read_result(out, recipe) or _build(source, out, config, workers, part, recipe)
    except (OSError, UserError):
        # Another process may have completed the dataset and removed the work directory in the meantime.
        if result := read_result(out, recipe):
            return result
        raise


def _build(
    source: Source, out: Path, config: BuildConfig, workers: int, part: ChunkSubset | None, recipe: dict[str, Any]
) -> BuildResult:
    work_dir = out / WORK
    info = _source_info(source, config)
    candidates = source.candidates()  # Before the claim: a wrong path must not occupy the directory.
    claim_work_dir(work_dir, recipe)
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    encoded, rejected, seconds = encode_all(source, config.encoding, config.seed, chunks, work_dir, workers, part)
    if part:
        result = BuildResult(
            clips=dict(Counter(clip.split for clip in encoded)),
            rejected=len(rejected),
            seconds=seconds,
            encoded_chunks=count_complete_chunks(work_dir),
            num_chunks=len(chunks),
        )
        return read_result(out, recipe) or result
    write_rejected(out, rejected)
    if not encoded:
        raise UserError(
            f"none of {len(candidates)} candidates could be used; the reasons are in {out / 'rejected.csv'}."
        )
    manifest = _write_dataset(encoded, out, config, info, workers)
    write_manifest(out, manifest | {"recipe": recipe, "rejected": len(rejected)})
    return BuildResult({name: split["clips"] for name, split in manifest["splits"].items()}, len(rejected), seconds)


def _source_info(source: Source, config: BuildConfig) -> SourceInfo:
    """Return what the source provides.

    Raises:
        UserError: if it does not fit the configuration.
    """
    if not isinstance(source, AnnotatedSource):
        return SourceInfo()
    if source.clip_seconds is not None and config.encoding.clip_s != source.clip_seconds:
        raise UserError(
            f"--clip-s={config.encoding.clip_s:g}: has to be {source.clip_seconds:g}, the duration of the annotations; "
            "leave the option out."
        )
    info = source.info()
    if info.multi_label and (config.label_noise or config.cross_class_only):
        raise UserError("--label-noise and --cross-class-only need one class per sample; this source is multi-label.")
    return info


@dataclass(frozen=True)
class _SplitSamples:
    """The samples of one split by id, with their noise.

    Attributes:
        name: name of the split.
        keys: N keys.
        clips: N encoded clips.
        true_labels, given_labels: [N] int64; all 0 for multi-label sources.
        audio_source: [N] int64, the id of the clip that the audio is from.
    """

    name: str
    keys: list[str]
    clips: list[EncodedClip]
    true_labels: np.ndarray
    given_labels: np.ndarray
    audio_source: np.ndarray


def _write_dataset(
    encoded: list[EncodedClip], out: Path, config: BuildConfig, info: SourceInfo, workers: int
) -> dict[str, Any]:
    """Write shards and tables of all splits; return the manifest."""
    work_dir = out / WORK
    classes = info.classes or sorted({clip.label for clip in encoded})
    members = member_extensions(config.encoding.codec, info.streams)
    audio_streams = {name for name, stream in info.streams.items() if stream.modality == "audio"}
    audio_members = frozenset(audio_streams or {"audio"})
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    events: list[pa.Table] = []
    annotated_splits: list[str] = []
    for position, name in enumerate(sorted({clip.split for clip in encoded})):
        clips = [clip for clip in encoded if clip.split == name]
        rng = np.random.default_rng([config.seed, 3, position])
        samples = _draw_samples(name, clips, classes, info.multi_label, config, rng)
        writer = SplitWriter(
            name, samples.keys, samples.clips, samples.audio_source, members, audio_members, config.encoding,
            folder=work_dir, scratch=work_dir,
        )  # fmt: skip
        shards, rows = writer.write(out, config.shard_samples, workers)
        splits[name] = {"clips": len(clips), "shards": shards}
        if name == "train" and (config.label_noise or config.correspondence_noise):
            splits[name]["noise"] = _noise_rates(samples, info.multi_label)
        index += rows
        labels.append(_labels_table(samples, classes, info.multi_label, config))
        events_of_split = _events_of(samples, classes, info)
        if events_of_split is not None:
            annotated_splits.append(name)
            events.append(events_of_split)
    write_index(out, index, members)
    write_table(out / "labels.parquet", pa.concat_tables(labels), work_dir)
    manifest = {"format": FORMAT, "classes": classes, "clip_s": config.encoding.clip_s, "splits": splits}
    if info.streams:
        manifest["streams"] = {name: dataclasses.asdict(stream) for name, stream in info.streams.items()}
    else:
        manifest["codec"] = config.encoding.codec
        manifest["fps"] = config.encoding.fps
        manifest["sample_rate_hz"] = config.encoding.sample_rate_hz
    if info.multi_label:
        manifest["multi_label"] = True
    if events:
        write_table(out / EVENTS, pa.concat_tables(events), work_dir)
        manifest["annotated_splits"] = annotated_splits
    return manifest


def _draw_samples(
    name: str,
    clips: list[EncodedClip],
    classes: list[str],
    multi_label: bool,
    config: BuildConfig,
    rng: np.random.Generator,
) -> _SplitSamples:
    """Shuffle the clips of a split; swap audio and flip labels if it is the training split."""
    clips = [clips[position] for position in rng.permutation(len(clips))]
    true = np.array([0 if multi_label else classes.index(clip.label) for clip in clips], dtype=np.int64)
    mismatch_rate = config.correspondence_noise if name == "train" else 0.0
    label_noise = config.label_noise if name == "train" else None
    audio_source = mismatch_pairs(len(clips), mismatch_rate, rng, true if config.cross_class_only else None)
    given = flip_labels(true, len(classes), label_noise, rng) if label_noise else true
    return _SplitSamples(name, sample_keys(name, len(clips)), clips, true, given, audio_source)


def _noise_rates(samples: _SplitSamples, multi_label: bool) -> dict[str, float]:
    """Return the exact rates of the injected noise."""
    true, audio_source = samples.true_labels, samples.audio_source
    rates = {
        "label_rate": float((samples.given_labels != true).mean()),
        "swapped_audio_rate": float((audio_source != np.arange(len(audio_source))).mean()),
    }
    if not multi_label:
        rates["cross_class_audio_rate"] = float((true[audio_source] != true).mean())
    return rates


def _labels_table(samples: _SplitSamples, classes: list[str], multi_label: bool, config: BuildConfig) -> pa.Table:
    """Return the rows of labels.parquet; true labels and audio sources are stored only if noise was injected."""
    names = np.array(classes, dtype=object)
    if multi_label:
        labels = [clip.label.split(LABEL_SEPARATOR) for clip in samples.clips]
    else:
        labels = names[samples.given_labels]
    columns = {
        "split": [samples.name] * len(samples.clips),
        "id": np.arange(len(samples.clips)),
        "key": samples.keys,
        "label": labels,
    }
    if config.label_noise:
        columns["true_label"] = names[samples.true_labels]
    if config.correspondence_noise:
        columns["pair_id"] = samples.audio_source
    return pa.table(columns)


def _events_of(samples: _SplitSamples, classes: list[str], info: SourceInfo) -> pa.Table | None:
    """Return the rows of events.parquet; None if a sample of the split has no annotated events."""
    by_sample = [info.events.get((samples.name, clip.source, clip.label)) for clip in samples.clips]
    annotated = [events for events in by_sample if events is not None]
    if len(annotated) < len(samples.clips):
        return None
    events = np.stack(annotated)
    events[:, 0] = events[samples.audio_source, 0]
    sources = np.array([clip.source for clip in samples.clips], dtype=object)
    return events_table(samples.name, np.array(samples.keys, dtype=object), sources, classes, events)
