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

from distav.config.errors import UserError, format_list
from distav.data.dataset import EVENTS, member_extensions
from distav.data.files import report_os_errors, write_table
from distav.data.manifest import FORMAT
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.candidates import describe_candidates, list_candidates
from distav.data.preparation.encode_workers import (
    EncodedClip,
    count_complete_chunks,
    encode_all,
    read_lists,
)
from distav.data.preparation.encoding import ClipSource
from distav.data.preparation.output_dir import (
    WORK,
    BuildResult,
    claim_work_dir,
    count_reasons,
    format_reasons,
    make_recipe,
    read_result,
    write_index,
    write_manifest,
    write_rejected,
)
from distav.data.preparation.shard_writer import SplitWriter
from distav.data.preparation.shared_work import Part
from distav.data.preparation.source import AnnotatedSource, FixedModalitiesSource, Source, SourceInfo
from distav.data.preparation.split_samples import SplitSamples, draw_samples, events_of, labels_table, noise_rates

CHUNK = 64
"""Candidates per chunk."""


def build_dataset(
    source: Source, out: Path, config: BuildConfig, workers: int, part: Part | None = None
) -> BuildResult:
    """Write a dataset to a directory, or resume an interrupted build.

    Args:
        source: provides the clips.
        out: directory of the dataset.
        config: encoding, noise and seed.
        workers: number of encoding processes.
        part: only encode these chunks and, when all chunks are encoded, only write these shards; a later call without
            `part` writes the dataset. With a leased part, processes on any machines share all of the work, and each
            returns when the dataset is complete.

    Raises:
        UserError: if the directory contains another dataset, or if no candidate could be used.
    """
    _check_modalities(source, config)
    with report_os_errors(out):
        # Before the directory is claimed: a wrong path must not occupy it.
        candidates = list_candidates(source, out)
        recipe = make_recipe(source, config, describe_candidates(candidates))
        try:
            return read_result(out, recipe) or _build(source, candidates, out, config, workers, part, recipe)
        except (OSError, UserError):
            # Another process may have completed the dataset and removed the work directory in the meantime.
            if result := read_result(out, recipe):
                return result
            raise


def _build(
    source: Source,
    candidates: list[ClipSource],
    out: Path,
    config: BuildConfig,
    workers: int,
    part: Part | None,
    recipe: dict[str, Any],
) -> BuildResult:
    work_dir = out / WORK
    info = _source_info(source, config)
    claim_work_dir(work_dir, recipe)
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    encoded, rejected, seconds = encode_all(source, config.encoding, config.seed, chunks, work_dir, workers, part)
    if part and not part.leased:
        result = BuildResult(
            clips=dict(Counter(clip.split for clip in encoded)),
            rejected=len(rejected),
            reasons=count_reasons(rejected),
            seconds=seconds,
            encoded_chunks=count_complete_chunks(work_dir),
            num_chunks=len(chunks),
        )
        if result.encoded_chunks == len(chunks):
            all_encoded, _ = read_lists(work_dir, range(len(chunks)))
            if all_encoded:
                _write_shards(all_encoded, out, config, info, workers, part)
        return read_result(out, recipe) or result
    write_rejected(out, rejected)
    if not encoded:
        raise UserError(
            f"none of {len(candidates)} candidates could be used ({format_reasons(count_reasons(rejected))}); the "
            f"reasons are in {out / 'rejected.csv'}."
        )
    splits = _write_shards(encoded, out, config, info, workers, part)
    manifest = _write_tables(splits, _classes_of(encoded, info), out, config, info)
    write_manifest(out, manifest | {"recipe": recipe, "rejected": len(rejected)})
    clips = {name: split["clips"] for name, split in manifest["splits"].items()}
    return BuildResult(clips, len(rejected), seconds, reasons=count_reasons(rejected))


def _check_modalities(source: Source, config: BuildConfig) -> None:
    """Raise a UserError if the source does not allow the modalities of the configuration."""
    modalities = config.encoding.modalities
    if isinstance(source, FixedModalitiesSource) and modalities not in source.allowed_modalities:
        reason = "all its samples have both modalities" if modalities == "any" else "its files have one modality"
        raise UserError(
            f"--modalities={modalities}: allowed for this source: {format_list(source.allowed_modalities)}, because "
            f"{reason}; leave the option out."
        )


def _source_info(source: Source, config: BuildConfig) -> SourceInfo:
    """Return what the source provides.

    Raises:
        UserError: if it does not fit the configuration.
    """
    if not isinstance(source, AnnotatedSource):
        return _checked_noise(SourceInfo(), config)
    if source.clip_seconds is not None and config.encoding.clip_s != source.clip_seconds:
        raise UserError(
            f"--clip-s={config.encoding.clip_s:g}: has to be {source.clip_seconds:g}, the duration of the annotations; "
            "leave the option out."
        )
    return _checked_noise(source.info(), config)


def _checked_noise(info: SourceInfo, config: BuildConfig) -> SourceInfo:
    """Return `info` if the noise of the configuration suits the labels of the source.

    Raises:
        UserError: otherwise.
    """
    if info.multi_label and (config.label_noise or config.cross_class_only):
        raise UserError(
            "--label-noise and --cross-class-only need one class per sample; this source is multi-label. Use "
            "--missing-labels and --wrong-labels for noise in label lists."
        )
    if config.corrupts_lists and not info.multi_label:
        raise UserError(
            "--missing-labels and --wrong-labels need a source with several classes per sample; use --label-noise for "
            "one class per sample."
        )
    return info


@dataclass(frozen=True)
class _WrittenSplit:
    """A split with all of its shards.

    Attributes:
        samples: its samples.
        shards: entries of its shards in the manifest.
        rows: rows of its samples in the index.
    """

    samples: SplitSamples
    shards: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def _write_shards(
    encoded: list[EncodedClip],
    out: Path,
    config: BuildConfig,
    info: SourceInfo,
    workers: int,
    part: Part | None,
) -> list[_WrittenSplit]:
    """Write the shards of a part; return the splits whose shards are all written."""
    work_dir = out / WORK
    classes, members = _classes_of(encoded, info), member_extensions(config.encoding.codec, info.streams)
    audio_streams = {name for name, stream in info.streams.items() if stream.modality == "audio"}
    written = []
    for position, name in enumerate(sorted({clip.split for clip in encoded})):
        clips = [clip for clip in encoded if clip.split == name]
        rng = np.random.default_rng([config.seed, 3, position])
        samples = draw_samples(name, clips, classes, info.multi_label, members, config, rng)
        writer = SplitWriter(
            name, samples.keys, samples.clips, samples.audio_source, members, frozenset(audio_streams or {"audio"}),
            config.encoding, folder=work_dir, scratch=work_dir,
        )  # fmt: skip
        if writer.write(out, config.shard_samples, workers, part):
            written.append(_WrittenSplit(samples, *writer.collect(config.shard_samples)))
    return written


def _classes_of(encoded: list[EncodedClip], info: SourceInfo) -> list[str]:
    return info.classes or sorted({clip.label for clip in encoded})


def _write_tables(
    written: list[_WrittenSplit], classes: list[str], out: Path, config: BuildConfig, info: SourceInfo
) -> dict[str, Any]:
    """Write the tables of all splits; return the manifest."""
    work_dir = out / WORK
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    events: list[pa.Table] = []
    annotated_splits: list[str] = []
    for split in written:
        samples, name = split.samples, split.samples.name
        splits[name] = {"clips": len(samples.clips), "shards": split.shards}
        if name == "train" and (config.label_noise or config.correspondence_noise or config.corrupts_lists):
            splits[name]["noise"] = noise_rates(samples, info.multi_label)
        index += split.rows
        labels.append(labels_table(samples, classes, info.multi_label, config))
        events_of_split = events_of(samples, classes, info)
        if events_of_split is not None:
            annotated_splits.append(name)
            events.append(events_of_split)
    write_index(out, index, member_extensions(config.encoding.codec, info.streams))
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
