"""Event annotations: weak labels of complete clips, and audible and visible events with start and end.

Legend: N samples, T segments of one second, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.labels import load_labels
from distav.data.annotations.multi_labels import load_multi_labels
from distav.data.dataset import EVENTS, ShardedDataset, Split
from distav.data.files import read_table
from distav.data.modalities import MODALITIES
from distav.data.strings import StringColumn

EVENTS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.int64()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("modality", pa.string()),
        ("label", pa.string()),
        ("start_s", pa.int32()),
        ("end_s", pa.int32()),
    ]
)
"""Schema of events.parquet: one row per event of one modality, from `start_s` up to and excluding `end_s`."""


@dataclass(frozen=True)
class EventLabels:
    """Event annotations of one split.

    Attributes:
        classes: class names.
        weak: [N, C] bool, classes of a clip, audible or visible.
        events: [N, 2, T, C] bool, events per modality and second; None if the split is not annotated. Used by
            evaluation only.
        num_segments: T.
    """

    classes: list[str]
    weak: np.ndarray
    events: np.ndarray | None
    num_segments: int


def load_events(shards: ShardedDataset, split: Split, override: str = "") -> EventLabels:
    """Read the classes of every clip of a split and, if it is annotated, its events.

    Args:
        shards: the dataset.
        split: its split.
        override: table that replaces given labels, see `load_labels`; empty: none.

    Raises:
        UserError: for unknown classes or an invalid table.
    """
    if shards.multi_label:
        weak = load_multi_labels(shards, split, override).given
    else:
        weak = np.zeros((len(split), len(shards.classes)), dtype=bool)
        weak[np.arange(len(split)), load_labels(shards, split, override).given] = True
    segments, events = num_segments(split), None
    if split.name in shards.manifest.get("annotated_splits", ()):
        table = shards.table(EVENTS, split.name)
        rows = np.arange(len(table))
        events, _ = _events_array(table, rows, shards.classes, len(split), segments, shards.root / EVENTS)
    return EventLabels(shards.classes, weak, events, segments)


def num_segments(split: Split) -> int:
    """Return T, the duration of a sample in whole seconds; all samples of a dataset have the same duration."""
    return max(1, round(float(split.columns["duration_s"][0])))


def events_table(
    split: str,
    keys: np.ndarray | StringColumn,
    sources: np.ndarray | StringColumn,
    classes: list[str],
    events: np.ndarray,
    annotated: np.ndarray | None = None,
) -> pa.Table:
    """Return a table with the schema `EVENTS_SCHEMA`, one row per uninterrupted event.

    Args:
        split: name of the split.
        keys: [N] keys of the samples.
        sources: [N] sources of the samples.
        classes: C class names.
        events: [N, 2, T, C] bool.
        annotated: [N] bool; annotated samples without events get one row without modality and label. None: no such
            rows.
    """
    by_class = events.transpose(0, 1, 3, 2).astype(np.int8)
    edges = np.diff(np.pad(by_class, ((0, 0), (0, 0), (0, 0), (1, 1))), axis=3)
    sample, modality, class_index, start = (edges == 1).nonzero()
    end = (edges == -1).nonzero()[3]
    modalities, labels = np.array(MODALITIES, dtype=object)[modality], np.array(classes, dtype=object)[class_index]
    if annotated is not None:
        empty = np.flatnonzero(annotated & ~events.any(axis=(1, 2, 3)))
        nulls, zeros = np.full(len(empty), None), np.zeros(len(empty), np.int64)
        sample = np.append(sample, empty)
        modalities, labels = np.append(modalities, nulls), np.append(labels, nulls)
        start, end = np.append(start, zeros), np.append(end, zeros)
    columns = {
        "split": [split] * len(sample),
        "id": sample,
        "key": keys[sample],
        "source": sources[sample],
        "modality": pa.array(modalities.tolist(), pa.string()),
        "label": pa.array(labels.tolist(), pa.string()),
        "start_s": start,
        "end_s": end,
    }
    return pa.table(columns).cast(EVENTS_SCHEMA)


def read_events(path: Path, key: str, split: Split, classes: list[str], weak: np.ndarray) -> tuple[np.ndarray, ...]:
    """Read an annotator's or a teacher's table of events for a split.

    A clip without a row is not annotated; a clip with one row without label is annotated and has no events. A table
    made for another dataset of the same videos (e.g. clips instead of features) is matched by `source`.

    Args:
        path: Parquet table with the columns of `EVENTS_SCHEMA`; `key` is optional, and so is `source` if the ids are
            those of this dataset.
        key: setting that names the table, for error messages.
        split: the split whose rows are read.
        classes: C class names.
        weak: [N, C] bool, classes of the clips, which distinguish clips of the same source.

    Returns:
        Events [N, 2, T, C] bool, and the annotated clips [N] bool.

    Raises:
        UserError: for a missing file or column, a table without rows of the split, or an invalid row; rows count from
            1.
    """
    what = f"{key}={path}"
    if not path.is_file():
        raise UserError(f"{what}: no such file; tools/pseudo_label.py writes such tables.")
    table = read_table(path)
    missing = [name for name in EVENTS_SCHEMA.names if name not in (*table.column_names, "key", "source")]
    if missing:
        raise UserError(
            f"{what}: column '{missing[0]}' is missing; a table of events has the columns "
            f"{format_list(EVENTS_SCHEMA.names)}."
        )
    splits = table.column("split").to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(splits == split.name)
    if not len(rows):
        raise UserError(
            f"{what}: no rows of split {split.name}; its rows belong to {format_list(sorted(set(map(str, splits))))}."
        )
    table = table.take(rows)
    if "source" in table.column_names:
        table, rows = _match_sources(table, rows, split, classes, weak, what)
    return _events_array(table, rows, classes, len(split), num_segments(split), what)


def _match_sources(
    table: pa.Table, rows: np.ndarray, split: Split, classes: list[str], weak: np.ndarray, what: str
) -> tuple[pa.Table, np.ndarray]:
    """Return the rows whose source is in this split, with this split's ids, and their row numbers.

    If all ids and sources match already, the table is returned unchanged. A row whose source has several clips belongs
    to those whose weak labels include its class.
    """
    sources = split.sources.tolist()
    ids, row_sources = table.column("id").to_pylist(), table.column("source").to_pylist()
    if all(
        isinstance(sample, int) and 0 <= sample < len(sources) and sources[sample] == source
        for sample, source in zip(ids, row_sources, strict=True)
    ):
        return table, rows
    samples_of: dict[str, list[int]] = {}
    for sample, source in enumerate(sources):
        samples_of.setdefault(source, []).append(sample)
    matched_rows: list[int] = []
    matched_ids: list[int] = []
    for row, (source, label) in enumerate(zip(row_sources, table.column("label").to_pylist(), strict=True)):
        samples = samples_of.get(source, [])
        if len(samples) > 1 and label in classes:
            samples = [sample for sample in samples if weak[sample, classes.index(label)]]
        matched_rows += [row] * len(samples)
        matched_ids += samples
    if not matched_rows:
        raise UserError(
            f"{what}: no row has a source of {split.root}; if the ids are those of this dataset, remove the column "
            "`source`."
        )
    column = pa.array(matched_ids, pa.int64())
    matched = table.take(matched_rows).set_column(table.column_names.index("id"), "id", column)
    return matched, rows[matched_rows]


def _events_array(
    table: pa.Table, rows: np.ndarray, classes: list[str], num_samples: int, segments: int, what: object
) -> tuple[np.ndarray, np.ndarray]:
    """Return the events of a table, [N, 2, T, C] bool, and the samples that it has rows of, [N] bool.

    Raises:
        UserError: for an unknown id, modality or class, or an invalid time; names the row by its number in `rows`.
    """
    events = np.zeros((num_samples, len(MODALITIES), segments, len(classes)), dtype=bool)
    annotated = np.zeros(num_samples, dtype=bool)
    columns = [table.column(name).to_pylist() for name in ("id", "modality", "label", "start_s", "end_s")]
    for row, sample, modality, label, start, end in zip(rows.tolist(), *columns, strict=True):
        where = f"{what}, row {row + 1}"
        if not isinstance(sample, int) or not 0 <= sample < num_samples:
            raise UserError(f"{where}: id {sample}; allowed: whole numbers from 0 to {num_samples - 1}.")
        annotated[sample] = True
        if label is None and modality is None:
            continue
        if modality not in MODALITIES:
            raise UserError(f"{where}: modality '{modality}'; allowed: {format_list(MODALITIES)}.")
        if label not in classes:
            raise UserError(
                f"{where}: unknown class '{label}'; allowed: {format_list(classes)}.{did_you_mean(label, classes)}"
            )
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= segments):
            raise UserError(
                f"{where}: start_s {start}, end_s {end}; allowed: whole seconds from 0 to {segments}, start_s not "
                "after end_s."
            )
        events[sample, MODALITIES.index(modality), start:end, classes.index(label)] = True
    return events, annotated
