"""What is heard and what is seen, second by second: weak labels of whole clips, and events with beginning and end.

Legend: N samples, T segments of one second, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.labels import class_indices, load_labels, multi_labels
from distav.data.dataset import EVENTS, ShardedDataset, Split
from distav.data.files import read_table
from distav.data.modalities import MODALITIES

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


@dataclass(frozen=True)
class EventLabels:
    """What one split says of events.

    Attributes:
        classes: their names.
        weak: [N, C] bool, the classes of a clip, be they heard or seen.
        events: [N, 2, T, C] bool, when they are heard and seen; None where nobody told. Only evaluation reads it.
        segments: T.
    """

    classes: list[str]
    weak: np.ndarray
    events: np.ndarray | None
    num_segments: int


def load_events(shards: ShardedDataset, split: Split, override: str = "") -> EventLabels:
    """Read the classes of every clip of a split, one or several each, and its events where they are known.

    Args:
        shards: the set.
        split: its split.
        override: a table used in place of the given labels, as for `load_labels`; empty for none.

    Raises:
        UserError: for labels outside the classes of the set, or a table that is broken.
    """
    weak = np.zeros((len(split), len(shards.classes)), dtype=bool)
    if shards.multi_label:
        for row, names in enumerate(multi_labels(shards, split)):
            weak[row, class_indices(names, shards.classes, shards.root / "labels.parquet")] = True
    else:
        weak[np.arange(len(split)), load_labels(shards, split, override).given] = True
    segments, events = num_segments(split), None
    if split.name in shards.manifest.get("annotated_splits", ()):
        table = shards.table(EVENTS, split.name)
        events, _ = _events_of(table, np.arange(len(table)), shards.classes, len(split), segments, shards.root / EVENTS)
    return EventLabels(shards.classes, weak, events, segments)


def num_segments(split: Split) -> int:
    """Return T, the whole seconds of a sample; all of a set last equally long."""
    return max(1, round(float(split.columns["duration_s"][0])))


def events_table(
    split: str,
    keys: np.ndarray,
    sources: np.ndarray,
    classes: list[str],
    events: np.ndarray,
    annotated: np.ndarray | None = None,
) -> pa.Table:
    """Return one row for each unbroken stretch of an event.

    Args:
        split: its name.
        keys, sources: [N] of the samples.
        classes: C names.
        events: [N, 2, T, C] bool.
        looked_at: [N] bool; those without any event get a row that says so, without modality and label.
    """
    rows = events.transpose(0, 1, 3, 2)
    edges = np.diff(np.pad(rows.astype(np.int8), ((0, 0), (0, 0), (0, 0), (1, 1))), axis=3)
    sample, modality, kind, start = (edges == 1).nonzero()
    end = (edges == -1).nonzero()[3]
    names, labels = np.array(MODALITIES, dtype=object)[modality], np.array(classes, dtype=object)[kind]
    if annotated is not None:
        empty = np.flatnonzero(annotated & ~events.any(axis=(1, 2, 3)))
        nothing = np.full(len(empty), None)
        sample, names, labels = (np.append(*both) for both in ((sample, empty), (names, nothing), (labels, nothing)))
        start, end = (np.append(each, np.zeros(len(empty), np.int64)) for each in (start, end))
    columns = {
        "split": [split] * len(sample),
        "id": sample,
        "key": keys[sample],
        "source": sources[sample],
        "modality": pa.array(names.tolist(), pa.string()),
        "label": pa.array(labels.tolist(), pa.string()),
        "start_s": start,
        "end_s": end,
    }
    return pa.table(columns).cast(EVENTS_SCHEMA)


def read_events(path: Path, key: str, split: Split, classes: list[str], weak: np.ndarray) -> tuple[np.ndarray, ...]:
    """Read a person's or a teacher's table of events for a split.

    A clip without a row was not looked at; one with a row without label was, and nothing happens in it. A table made
    for another set of the same videos, of clips where this one has features, is joined by `source`.

    Args:
        path: a Parquet table with the columns of `EVENTS_SCHEMA`, `key` and, where ids are this set's, `source` aside.
        key: the setting that names it.
        split: whose rows are read.
        classes: C names.
        weak: [N, C] bool, the classes of its clips, by which clips of one source are told apart.

    Returns:
        [N, 2, T, C] bool, and which clips were looked at, [N] bool.

    Raises:
        UserError: for a missing file or column, no row of the split, or a row that does not fit it.
    """
    what = f"{key}={path}"
    if not path.is_file():
        raise UserError(f"{what}: no such file; tools/pseudo_label.py writes such tables.")
    table = read_table(path)
    missing = [name for name in EVENTS_SCHEMA.names if name not in (*table.column_names, "key", "source")]
    if missing:
        raise UserError(
            f"{what}: column '{missing[0]}' is missing; a table of events has {format_list(EVENTS_SCHEMA.names)}."
        )
    splits = table.column("split").to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(splits == split.name)
    if not len(rows):
        raise UserError(
            f"{what}: has no row of the split {split.name}, but of {format_list(sorted(set(map(str, splits))))}."
        )
    table = table.take(rows)
    if "source" in table.column_names:
        table, rows = _joined(table, rows, split, classes, weak, what)
    return _events_of(table, rows, classes, len(split), num_segments(split), what)


def _joined(
    table: pa.Table, rows: np.ndarray, split: Split, classes: list[str], weak: np.ndarray, what: str
) -> tuple[pa.Table, np.ndarray]:
    """Return the table with this split's ids, without the videos that the split does not have, and its rows."""
    sources = split.columns["source"].tolist()
    ids, named, labels = (table.column(name).to_pylist() for name in ("id", "source", "label"))
    if all(
        isinstance(at, int) and 0 <= at < len(sources) and sources[at] == name
        for at, name in zip(ids, named, strict=True)
    ):
        return table, rows
    places: dict[str, list[int]] = {}
    for number, name in enumerate(sources):
        places.setdefault(name, []).append(number)
    kept, found = [], []
    for row, (name, label) in enumerate(zip(named, labels, strict=True)):
        of_it = places.get(name, [])
        if len(of_it) > 1 and label in classes:
            of_it = [number for number in of_it if weak[number, classes.index(label)]]
        kept += [row] * len(of_it)
        found += of_it
    if not kept:
        raise UserError(
            f"{what}: no row names a video of {split.root}; where the table holds this set's ids, leave out `source`."
        )
    column = pa.array(found, pa.int64())
    return table.take(kept).set_column(table.column_names.index("id"), "id", column), rows[kept]


def _events_of(
    table: pa.Table, rows: np.ndarray, classes: list[str], num_samples: int, segments: int, what: object
) -> tuple[np.ndarray, np.ndarray]:
    """Return the events of a table, [N, 2, T, C] bool, and which clips it has rows of, [N] bool.

    Raises:
        UserError: for a row of no sample, modality, class or second of the set.
    """
    events = np.zeros((num_samples, len(MODALITIES), segments, len(classes)), dtype=bool)
    looked_at = np.zeros(num_samples, dtype=bool)
    columns = (table.column(name).to_pylist() for name in ("id", "modality", "label", "start_s", "end_s"))
    for row, sample, modality, label, start, end in zip(rows.tolist(), *columns, strict=True):
        where = f"{what}, row {row}"
        if not isinstance(sample, int) or not 0 <= sample < num_samples:
            raise UserError(f"{where}: id {sample}; allowed: whole numbers from 0 to {num_samples - 1}.")
        looked_at[sample] = True
        if label is None and modality is None:
            continue
        if modality not in MODALITIES:
            raise UserError(f"{where}: modality '{modality}'; allowed: {format_list(MODALITIES)}.")
        if label not in classes:
            raise UserError(
                f"{where}: unknown class '{label}'; allowed: {format_list(classes)}.{did_you_mean(label, classes)}"
            )
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= segments):
            raise UserError(f"{where}: from {start} to {end} s; allowed: whole seconds from 0 to {segments}.")
        events[sample, MODALITIES.index(modality), start:end, classes.index(label)] = True
    return events, looked_at
