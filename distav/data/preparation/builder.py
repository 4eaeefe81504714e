"""From candidates to a finished set, in two steps that can both be interrupted.

First, workers encode candidates in chunks into `.work`; a chunk is finished when its JSON list is there. Then the
clips are shuffled, numbered and copied into tars; a tar is finished when it has its name. Randomness hangs on the seed
and on the place of a candidate in the list alone, so the bytes are the same for any number of workers, machines or
restarts.
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
from distav.data.annotations.llp import DURATION_S
from distav.data.dataset import EVENTS, member_extensions
from distav.data.files import write_table
from distav.data.manifest import FORMAT
from distav.data.preparation.annotated_videos import EventSource, SourceInfo
from distav.data.preparation.encode_workers import EncodedClip, ChunkSubset, encode_all, finished
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.noise_injection import LabelNoise, flip_labels, mismatch_pairs
from distav.data.preparation.output_dir import (
    WORK,
    BuildResult,
    claim_work_dir,
    write_manifest,
    read_result,
    recipe_of,
    write_index,
    write_rejected,
)
from distav.data.preparation.shard_writer import SplitWriter, sample_keys
from distav.data.preparation.sources import Source

CHUNK = 64
"""Candidates encoded as one piece of work."""


@dataclass(frozen=True)
class BuildConfig:
    """Everything besides the source that decides the bytes of a set."""

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


def build_dataset(source: Source, out: Path, plan: BuildConfig, workers: int, part: ChunkSubset | None = None) -> BuildResult:
    """Write a whole set into a folder; called again after a kill, it goes on where it was.

    Args:
        source: where clips come from.
        out: the folder of the set.
        plan: encoding, noise, seed.
        workers: processes that encode.
        part: of the chunks, which alone is encoded, on this machine; the set is then left for a later call.

    Raises:
        UserError: where the folder holds another set, or no candidate could be used.
    """
    recipe = recipe_of(source, plan)
    try:
        return read_result(out, recipe) or _build(source, out, plan, workers, part, recipe)
    except (OSError, UserError):
        if done := read_result(out, recipe):  # Another command has finished it meanwhile.
            return done
        raise


def _build(
    source: Source, out: Path, plan: BuildConfig, workers: int, part: ChunkSubset | None, recipe: dict[str, Any]
) -> BuildResult:
    work = out / WORK
    about = source.info() if isinstance(source, EventSource) else SourceInfo()
    if isinstance(source, EventSource) and plan.encoding.clip_s != DURATION_S:
        raise UserError(f"--clip-s={plan.encoding.clip_s:g}: the annotations are of {DURATION_S} s; leave it out.")
    if about.multi_label and (plan.label_noise or plan.cross_class_only):
        raise UserError("--label-noise and --cross-class-only are for one class a sample; these have several.")
    claim_work_dir(work, recipe)
    candidates = source.candidates()
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    encoded, rejected, seconds = encode_all(source, plan.encoding, plan.seed, chunks, work, workers, part)
    if part:
        clips = dict(Counter(each.split for each in encoded))
        return read_result(out, recipe) or BuildResult(clips, len(rejected), seconds, (finished(work), len(chunks)))
    write_rejected(out, rejected)
    if not encoded:
        raise UserError(
            f"none of {len(candidates)} candidates could be used; {out / 'rejected.csv'} gives the reasons."
        )
    manifest = _assemble(encoded, out, work, plan, about, workers)
    write_manifest(out, manifest | {"recipe": recipe, "rejected": len(rejected)})
    return BuildResult({name: split["clips"] for name, split in manifest["splits"].items()}, len(rejected), seconds)


def _assemble(
    encoded: list[EncodedClip], out: Path, work: Path, plan: BuildConfig, about: SourceInfo, workers: int
) -> dict[str, Any]:
    """Shuffle, number and copy the encoded clips into tars; write the tables; return the manifest."""
    classes = about.classes or sorted({each.label for each in encoded})
    members = member_extensions(plan.encoding.codec, about.streams)
    sounds = frozenset({name for name, each in about.streams.items() if each.modality == "audio"} or {"audio"})
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    events: list[pa.Table] = []
    annotated: list[str] = []
    for place, name in enumerate(sorted({each.split for each in encoded})):
        rng = np.random.default_rng([plan.seed, 3, place])
        clips = [each for each in encoded if each.split == name]
        clips = [clips[number] for number in rng.permutation(len(clips))]
        noisy = name == "train"
        true = np.array([0 if about.multi_label else classes.index(each.label) for each in clips], dtype=np.int64)
        swapped = plan.correspondence_noise if noisy else 0.0
        pair = mismatch_pairs(len(clips), swapped, rng, true if plan.cross_class_only else None)
        keys = sample_keys(name, len(clips))
        samples = SplitWriter(name, keys, clips, pair, members, sounds, plan.encoding, work, work)
        shards, rows = samples.write(out, plan.shard_samples, workers)
        index += rows
        splits[name] = {"clips": len(clips), "shards": shards}
        flips = plan.label_noise if noisy else None
        given = flip_labels(true, len(classes), flips, rng) if flips else true
        names = np.array(classes, dtype=object)
        labels.append(_label_table(name, clips, names, given, true, pair, about.multi_label))
        known = [about.events.get((name, each.source, each.label)) for each in clips]
        if clips and all(each is not None for each in known):
            annotated.append(name)
            told = np.stack([each for each in known if each is not None])
            told[:, 0] = told[pair, 0]
            sources = np.array([each.source for each in clips], dtype=object)
            events.append(events_table(name, np.array(keys, dtype=object), sources, classes, told))
        if noisy and (flips or plan.correspondence_noise):
            splits[name]["noise"] = {
                "label_rate": float((given != true).mean()),
                "swapped_audio_rate": float((pair != np.arange(len(pair))).mean()),
            }
            if not about.multi_label:
                splits[name]["noise"]["cross_class_audio_rate"] = float((true[pair] != true).mean())
    write_index(out, index, members)
    write_table(out / "labels.parquet", _with_truth(pa.concat_tables(labels), plan), work)
    manifest = {"format": FORMAT, "classes": classes, "clip_s": plan.encoding.clip_s, "splits": splits}
    if about.streams:
        manifest["streams"] = {name: dataclasses.asdict(each) for name, each in about.streams.items()}
    else:
        rates = {"fps": plan.encoding.fps, "sample_rate_hz": plan.encoding.sample_rate_hz}
        manifest |= {"codec": plan.encoding.codec, **rates}
    if about.multi_label:
        manifest["multi_label"] = True
    if events:
        write_table(out / EVENTS, pa.concat_tables(events), work)
        manifest["annotated_splits"] = annotated
    return manifest


def _with_truth(table: pa.Table, plan: BuildConfig) -> pa.Table:
    """Leave out the columns of truth where no noise was injected."""
    table = table if plan.label_noise else table.drop_columns(["true_label"])
    return table if plan.correspondence_noise else table.drop_columns(["pair_id"])


def _label_table(
    split: str,
    clips: list[EncodedClip],
    names: np.ndarray,
    given: np.ndarray,
    true: np.ndarray,
    pair: np.ndarray,
    several: bool,
) -> pa.Table:
    return pa.table(
        {
            "split": [split] * len(clips),
            "id": np.arange(len(clips)),
            "key": sample_keys(split, len(clips)),
            "label": [each.label.split(",") for each in clips] if several else names[given],
            "true_label": names[true],
            "pair_id": pair,
        }
    )
