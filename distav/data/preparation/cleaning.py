"""Copy a dataset with reviewed labels and without removed clips; the members are copied byte by byte.

Only the training split changes. Clips keep their keys, sources and order; ids are consecutive again.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError
from distav.data.annotations.labels import load_labels
from distav.data.annotations.multi_labels import LABEL_SEPARATOR, class_matrix, label_lists, load_multi_labels
from distav.data.dataset import EVENTS, ShardedDataset, Split
from distav.data.files import write_table
from distav.data.preparation.encode_workers import EncodedClip
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.list_decisions import apply_list_decisions
from distav.data.preparation.multi_label_noise import multi_label_rates
from distav.data.preparation.output_dir import (
    WORK,
    BuildResult,
    claim_work_dir,
    make_recipe,
    read_result,
    write_clip_list,
    write_index,
    write_manifest,
    write_rejected,
)
from distav.data.preparation.review_decisions import ReviewResult, apply_decisions
from distav.data.preparation.reviewers import REVIEW, review_to_json
from distav.data.preparation.shard_writer import SplitWriter

CLEANED_SPLIT = "train"


@dataclass(frozen=True)
class CleaningConfig:
    """`clean SHARDS`: a dataset and reviews of its training clips; `decisions` take precedence over `labels`.

    Attributes:
        root: directory of the dataset.
        decisions: tables of the reviewers' decisions, one per reviewer.
        labels: table of a run's corrected labels.
        min_confidence: confidence from which a corrected label replaces the given label.
        min_correspondence: correspondence probability below which a clip is removed.
        shard_samples: samples per shard.
    """

    root: Path
    decisions: tuple[Path, ...] = ()
    labels: Path | None = None
    min_confidence: float = 0.9
    min_correspondence: float = 0.0
    shard_samples: int = 1000

    def __post_init__(self) -> None:
        if not self.decisions and not self.labels:
            raise UserError("clean: give --decisions FILE, --labels TABLE, or both.")
        for name in ("min_confidence", "min_correspondence"):
            if not 0 <= getattr(self, name) <= 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option}={getattr(self, name)}: has to be from 0 to 1.")
        if self.shard_samples < 1:
            raise UserError(f"--shard-samples={self.shard_samples}: has to be 1 or more.")

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the manifest and the tables, by argument.

        Raises:
            UserError: if one cannot be read.
        """
        files = [("SHARDS", self.root / "manifest.json"), *(("--decisions", path) for path in self.decisions)]
        if self.labels:
            files.append(("--labels", self.labels))
        digests: dict[str, list[str]] = {}
        for argument, path in files:
            try:
                digests.setdefault(argument, []).append(hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                raise UserError(f"{argument}={path}: {error.strerror}.") from None
        return {argument: " ".join(values) for argument, values in digests.items()}


def clean_dataset(config: CleaningConfig, out: Path, workers: int) -> BuildResult:
    """Write the cleaned dataset, or resume an interrupted run.

    Args:
        config: the dataset and the reviews.
        out: directory of the new dataset.
        workers: shards that are written in parallel.

    Raises:
        UserError: for tables that do not fit the dataset, corrupt members, or if no clip would be kept.
    """
    _check_directories(config.root, out)
    shards = ShardedDataset.open(config.root)
    if shards.multi_label and config.min_correspondence:
        raise UserError(
            f"--min-correspondence={config.min_correspondence}: mismatched pairs are not estimated on {config.root}, "
            "because its clips may have several classes; leave the option out."
        )
    if shards.multi_label and config.min_confidence < 0.5:
        raise UserError(
            f"--min-confidence={config.min_confidence}: allowed on {config.root}, whose clips may have several "
            "classes: 0.5 to 1; below 0.5, a class could be both set and removed."
        )
    recipe = make_recipe(config, config.digests())
    train = shards.split(CLEANED_SPLIT, "clean: split")
    if shards.multi_label:
        review = apply_list_decisions(shards, train, config.decisions, config.labels, config.min_confidence)
    else:
        review = apply_decisions(
            shards, train, config.decisions, config.labels, config.min_confidence, config.min_correspondence
        )
    if not len(review.kept):
        raise UserError(f"{config.root}: all clips of {CLEANED_SPLIT} would be removed; lower --min-correspondence.")
    if result := read_result(out, recipe):
        return result
    claim_work_dir(out / WORK, recipe)
    write_rejected(out, [_rejected_row(shards, train, review, sample) for sample in sorted(review.removed)])
    manifest = _copy(shards, review, out, config.shard_samples, workers)
    changed = review.given != review.reviewed
    num_relabeled = int(changed.reshape(len(changed), -1).any(1)[review.kept].sum())
    manifest |= {"recipe": recipe, "rejected": len(review.removed), "num_relabeled": num_relabeled}
    manifest.pop(REVIEW, None)  # A dataset that was cleaned before has one of its own.
    if review.review:
        manifest[REVIEW] = review_to_json(review.review)
    write_manifest(out, manifest)
    result = read_result(out, recipe)
    assert result
    return result


def _check_directories(root: Path, out: Path) -> None:
    """Raise a UserError if one of the directories of the dataset and of its copy is the other one or contains it."""
    old, new = root.resolve(), out.resolve()
    if old == new:
        raise UserError(f"OUT={out}: OUT is SHARDS; give another directory for OUT.")
    for inner, outer, relation in ((new, old, "inside SHARDS"), (old, new, "a directory that contains SHARDS")):
        if inner.is_relative_to(outer):
            raise UserError(f"OUT={out}: OUT is {relation}, {root}; give another directory for OUT.")


def _rejected_row(shards: ShardedDataset, split: Split, review: ReviewResult, sample: int) -> dict[str, Any]:
    return _listed_clip(shards, split, sample, review.given[sample]) | {"reason": review.removed[sample]}


def _listed_clip(shards: ShardedDataset, split: Split, sample: int, label: Any) -> dict[str, Any]:
    """Return the row of a clip in a list: its file, the section of it, and a label as in `_label_text`."""
    start = float(split.columns["start_s"][sample])
    end = start + float(split.columns["duration_s"][sample])
    return {"path": split.sources[sample], "start_s": start, "end_s": end, "label": _label_text(shards, label)}


def _label_text(shards: ShardedDataset, label: Any) -> str:
    """Return the name of a class, given by its index, or the names of a list, given as [C] bool."""
    if shards.multi_label:
        return LABEL_SEPARATOR.join(label_lists(label[None], shards.classes)[0])
    return shards.classes[label]


def _copy(shards: ShardedDataset, review: ReviewResult, out: Path, shard_samples: int, workers: int) -> dict[str, Any]:
    """Write shards and tables of all splits; return the manifest."""
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    events: list[pa.Table] = []
    listed: list[dict[str, Any]] = []
    members: dict[str, str] = {}
    for name, original in shards.manifest["splits"].items():
        split = shards.split(name)
        if name == CLEANED_SPLIT:
            given, kept = review.reviewed, review.kept
        else:
            given, kept = _given_labels(shards, split), np.arange(len(split))
        members = split.members
        writer = _split_writer(shards, split, kept, out)
        writer.write(out, shard_samples, workers)
        entries, rows = writer.collect(shard_samples)
        splits[name] = {"clips": len(kept), "shards": entries}
        index += rows
        listed += [_listed_clip(shards, split, sample, given[sample]) | {"split": name} for sample in kept.tolist()]
        table = _labels_table(shards, split, kept, given, bool(review.removed))
        labels.append(table)
        if "noise" in original and "true_label" in table.column_names:
            splits[name]["noise"] = _label_noise(shards, table)
        if name in shards.manifest.get("annotated_splits", ()):
            events.append(_events_table(shards, split, kept))
    write_clip_list(out, listed)
    write_index(out, index, members)
    write_table(out / "labels.parquet", pa.concat_tables(labels), out / WORK)
    if events:
        write_table(out / EVENTS, pa.concat_tables(events), out / WORK)
    return shards.manifest | {"splits": splits}


def _split_writer(shards: ShardedDataset, split: Split, kept: np.ndarray, out: Path) -> SplitWriter:
    """Return a writer of the kept clips of a split.

    Raises:
        UserError: if the clips have different durations.
    """
    columns, manifest = split.columns, shards.manifest
    rates = {name: manifest[name] for name in ("codec", "fps", "sample_rate_hz") if name in manifest}
    encoding = Encoding(**rates, clip_s=float(columns["duration_s"][0]))
    frames = columns.get("frames", np.zeros(0))
    if (columns["duration_s"] != encoding.clip_s).any() or not np.isin(frames, (0, encoding.num_frames)).all():
        raise UserError(
            f"{split.root}: clips of {split.name} differ in duration; make_shards.py does not write such datasets."
        )
    return SplitWriter(
        split=split.name,
        keys=split.keys[kept].tolist(),
        clips=[_stored_clip(split, sample) for sample in kept.tolist()],
        audio_source=np.arange(len(kept)),
        members=split.members,
        audio_members=frozenset(),
        encoding=encoding,
        folder=Path(split.root),
        scratch=out / WORK,
    )


def _stored_clip(split: Split, sample: int) -> EncodedClip:
    """Return the positions of the members of a sample in the original dataset."""
    columns = split.columns
    members = {}
    for member in split.members:
        offset, size = int(columns[f"{member}_offset"][sample]), int(columns[f"{member}_bytes"][sample])
        if size:  # A clip may lack a member.
            members[member] = offset, size, int(columns[f"{member}_crc32"][sample])
    return EncodedClip(
        file=split.shards[int(columns["shard"][sample])].name,
        source=split.sources[sample],
        label="",
        split=split.name,
        start_s=float(columns["start_s"][sample]),
        width=int(columns["width"][sample]) if "width" in columns else 0,
        height=int(columns["height"][sample]) if "height" in columns else 0,
        members=members,
    )


def _labels_table(
    shards: ShardedDataset, split: Split, kept: np.ndarray, given: np.ndarray, clips_removed: bool
) -> pa.Table:
    """Return the rows of labels.parquet; `pair_id` refers to the original ids, and is dropped if they change."""
    table = shards.table("labels.parquet", split.name).take(kept)
    if shards.multi_label:
        labels = pa.array(_reviewed_lists(shards, table, given[kept]), pa.list_(pa.string()))
    else:
        labels = pa.array(np.array(shards.classes, dtype=object)[given[kept]], pa.string())
    table = _set_column(table, "id", pa.array(np.arange(len(kept))))
    table = _set_column(table, "label", labels)
    return table.drop_columns(["pair_id"]) if clips_removed and "pair_id" in table.column_names else table


def _given_labels(shards: ShardedDataset, split: Split) -> np.ndarray:
    """Return the labels of a split, [N] int64 or [N, C] bool."""
    return load_multi_labels(shards, split).given if shards.multi_label else load_labels(shards, split).given


def _reviewed_lists(shards: ShardedDataset, table: pa.Table, reviewed: np.ndarray) -> list[list[str]]:
    """Return the label lists of clips [M, C] bool; those that did not change keep the order of the original."""
    original = [names or [] for names in table.column("label").to_pylist()]
    return [
        old if set(old) == set(new) else new
        for old, new in zip(original, label_lists(reviewed, shards.classes), strict=True)
    ]


def _label_noise(shards: ShardedDataset, table: pa.Table) -> dict[str, float]:
    """Return the rates of wrong labels of a cleaned split, for the manifest."""
    labels, true_labels = table.column("label").to_pylist(), table.column("true_label").to_pylist()
    if shards.multi_label:
        given, true = (class_matrix(lists, shards.classes, "labels.parquet") for lists in (labels, true_labels))
        return multi_label_rates(true, given)
    wrong = [label != true_label for label, true_label in zip(labels, true_labels, strict=True)]
    return {"label_rate": float(np.mean(wrong))}


def _events_table(shards: ShardedDataset, split: Split, kept: np.ndarray) -> pa.Table:
    """Return the rows of events.parquet of the kept clips, with their new ids."""
    table = shards.table(EVENTS, split.name)
    new_ids = np.full(len(split), -1)
    new_ids[kept] = np.arange(len(kept))
    ids = new_ids[table.column("id").to_numpy()]
    return _set_column(table, "id", pa.array(ids)).filter(pa.array(ids >= 0))


def _set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)
