"""A new set from an old one: labels decided anew, clips left out, and every member copied byte by byte.

The train split alone is changed. Clips keep their keys, sources and order; ids run without gaps again.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError
from distav.data.annotations.labels import load_labels
from distav.data.dataset import EVENTS, ShardedDataset, Split
from distav.data.files import write_table
from distav.data.preparation.encode_workers import EncodedClip
from distav.data.preparation.encoding import Encoding
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
from distav.data.preparation.review_decisions import ReviewResult, apply_decisions
from distav.data.preparation.shard_writer import SplitWriter

CHANGED = "train"


@dataclass(frozen=True)
class CleaningConfig:
    """`cleaned SHARDS`: a set, and what is known of its training clips; `decisions` win over `labels`."""

    root: Path
    decisions: Path | None = None
    labels: Path | None = None
    min_confidence: float = 0.9
    min_correspondence: float = 0.0
    shard_samples: int = 1000

    def __post_init__(self) -> None:
        if not self.decisions and not self.labels:
            raise UserError("cleaned: give --decisions FILE, --labels TABLE, or both.")
        for name in ("min_confidence", "min_correspondence"):
            if not 0 <= getattr(self, name) <= 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option}={getattr(self, name)}: allowed: from 0 to 1.")
        if self.shard_samples < 1:
            raise UserError(f"--shard-samples={self.shard_samples}: has to be 1 or more.")

    def digests(self) -> dict[str, str]:
        """Return what was in the files at hand: SHA-256 by name.

        Raises:
            UserError: where one cannot be read.
        """
        files = {"SHARDS": self.root / "manifest.json", "--decisions": self.decisions, "--labels": self.labels}
        found = {}
        for name, path in files.items():
            try:
                found |= {name: hashlib.sha256(path.read_bytes()).hexdigest()} if path else {}
            except OSError as error:
                raise UserError(f"{name}={path}: {error.strerror}.") from None
        return found


def clean_dataset(cleaning: CleaningConfig, out: Path, workers: int) -> BuildResult:
    """Write the cleaned set; called again after a kill, it goes on where it was.

    Args:
        cleaning: the set and what is known of it.
        out: the folder of the new set.
        workers: tars that are written at a time.

    Raises:
        UserError: for a set of several labels, tables that do not fit it, damaged members, or if no clip is left.
    """
    shards = ShardedDataset.open(cleaning.root)
    if shards.multi_label:
        raise UserError(f"{cleaning.root}: its clips have several classes each; `cleaned` takes sets of one a clip.")
    recipe = recipe_of(cleaning, cleaning.digests())
    if done := read_result(out, recipe):
        return done
    train = shards.split(CHANGED, "cleaned: split")
    options = cleaning.decisions, cleaning.labels, cleaning.min_confidence, cleaning.min_correspondence
    verdict = apply_decisions(shards, train, *options)
    if not len(verdict.kept):
        raise UserError(f"{cleaning.root}: every clip of {CHANGED} would be left out; lower --min-correspondence.")
    claim_work_dir(out / WORK, recipe)
    write_rejected(out, [_rejected(shards, train, verdict, sample) for sample in sorted(verdict.removed)])
    manifest = _copy(shards, verdict, out, cleaning.shard_samples, workers)
    changed = int((verdict.given != verdict.reviewed)[verdict.kept].sum())
    write_manifest(out, manifest | {"recipe": recipe, "rejected": len(verdict.removed), "num_relabeled": changed})
    done = read_result(out, recipe)
    assert done
    return done


def _rejected(shards: ShardedDataset, split: Split, verdict: ReviewResult, sample: int) -> dict[str, Any]:
    start = float(split.columns["start_s"][sample])
    return {
        "path": split.columns["source"][sample],
        "start_s": start,
        "end_s": start + float(split.columns["duration_s"][sample]),
        "label": shards.classes[verdict.given[sample]],
        "reason": verdict.removed[sample],
    }


def _copy(shards: ShardedDataset, verdict: ReviewResult, out: Path, shard_samples: int, workers: int) -> dict[str, Any]:
    """Write tars and tables of every split; returns the manifest."""
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    events: list[pa.Table] = []
    for name, before in shards.manifest["splits"].items():
        split = shards.split(name)
        given = verdict.reviewed if name == CHANGED else load_labels(shards, split).given
        kept = verdict.kept if name == CHANGED else np.arange(len(split))
        written, rows = _samples(shards, split, kept, out).write(out, shard_samples, workers)
        splits[name] = {"clips": len(kept), "shards": written}
        index += rows
        table = _labels(shards, split, kept, given, bool(verdict.removed))
        labels.append(table)
        if "noise" in before and "true_label" in table.column_names:
            pairs = zip(table.column("label").to_pylist(), table.column("true_label").to_pylist(), strict=True)
            splits[name]["noise"] = {"label_rate": float(np.mean([one != other for one, other in pairs]))}
        if name in shards.manifest.get("annotated_splits", ()):
            events.append(_events(shards, split, kept))
    write_index(out, index, split.members)
    write_table(out / "labels.parquet", pa.concat_tables(labels), out / WORK)
    if events:
        write_table(out / EVENTS, pa.concat_tables(events), out / WORK)
    return shards.manifest | {"splits": splits}


def _samples(shards: ShardedDataset, split: Split, kept: np.ndarray, out: Path) -> SplitWriter:
    columns, manifest = split.columns, shards.manifest
    rates = {name: manifest[name] for name in ("codec", "fps", "sample_rate_hz") if name in manifest}
    encoding = Encoding(**rates, clip_s=float(columns["duration_s"][0]))
    frames = columns.get("frames", np.array(encoding.num_frames))
    if (columns["duration_s"] != encoding.clip_s).any() or (frames != encoding.num_frames).any():
        raise UserError(
            f"{split.root}: clips of {split.name} differ in length; make_shards.py does not write such sets."
        )
    clips = [_stored(split, sample) for sample in kept.tolist()]
    keys = split.keys[kept].tolist()
    donors = np.arange(len(kept))
    return SplitWriter(
        split.name,
        keys,
        clips,
        donors,
        split.members,
        frozenset(),
        encoding,
        folder=Path(split.root),
        scratch=out / WORK,
    )


def _stored(split: Split, sample: int) -> EncodedClip:
    """Return where the members of a sample lie in the old set."""

    def place(member: str) -> tuple[int, int, int]:
        offset, size, crc32 = (int(split.columns[f"{member}_{each}"][sample]) for each in ("offset", "bytes", "crc32"))
        return offset, size, crc32

    columns = split.columns
    return EncodedClip(
        file=split.shards[int(columns["shard"][sample])].name,
        source=columns["source"][sample],
        label="",
        split=split.name,
        start_s=float(columns["start_s"][sample]),
        width=int(columns["width"][sample]) if "width" in columns else 0,
        height=int(columns["height"][sample]) if "height" in columns else 0,
        members={member: place(member) for member in split.members},
    )


def _labels(shards: ShardedDataset, split: Split, kept: np.ndarray, given: np.ndarray, fewer: bool) -> pa.Table:
    """Return the rows of labels.parquet; `pair_id` names ids of before, and goes where they have changed."""
    table = shards.table("labels.parquet", split.name).take(kept)
    names = np.array(shards.classes, dtype=object)[given[kept]]
    for column, values in (("id", pa.array(np.arange(len(kept)))), ("label", pa.array(names, pa.string()))):
        table = table.set_column(table.column_names.index(column), column, values)
    return table.drop_columns(["pair_id"]) if fewer and "pair_id" in table.column_names else table


def _events(shards: ShardedDataset, split: Split, kept: np.ndarray) -> pa.Table:
    table = shards.table(EVENTS, split.name)
    new = np.full(len(split), -1)
    new[kept] = np.arange(len(kept))
    ids = new[table.column("id").to_numpy()]
    place = table.column_names.index("id")
    return table.set_column(place, "id", pa.array(ids)).filter(pa.array(ids >= 0))
