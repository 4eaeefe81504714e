"""What is heard and what is seen, second by second: weak labels of whole clips, and events with beginning and end.

Legend: N samples, T segments of one second, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.data.format import EVENTS, SENSES, ShardSet, Split, read_table
from distav.data.labels import class_numbers
from distav.errors import UserError, listed

EVENTS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.int64()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("sense", pa.string()),
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
    segments: int


def load_events(shards: ShardSet, split: Split) -> EventLabels:
    """Read the classes of every clip of a split, one or several each, and its events where they are known.

    Raises:
        UserError: for labels outside the classes of the set, or a table that is broken.
    """
    path = shards.root / "labels.parquet"
    table = shards.table("labels.parquet", split.name)
    if len(table) != len(split) or "label" not in table.column_names:
        raise UserError(f"{path}: no 'label', or not one row for each of the {len(split)} samples of {split.name}.")
    labels = table.column("label").to_pylist()
    weak = np.zeros((len(split), len(shards.classes)), dtype=bool)
    for row, names in enumerate(labels):
        for number in class_numbers(names if isinstance(names, list) else [names], shards.classes, path):
            weak[row, number] = True
    segments = segments_of(split)
    events = None
    if split.name in shards.manifest.get("annotated", ()):
        events = events_of(shards.table(EVENTS, split.name), shards.classes, len(split), segments, path)
    return EventLabels(shards.classes, weak, events, segments)


def segments_of(split: Split) -> int:
    """Return T, the whole seconds of a sample; all of a set last equally long."""
    return max(1, round(float(split.columns["duration_s"][0])))


def events_table(split: str, keys: np.ndarray, sources: np.ndarray, classes: list[str], events: np.ndarray) -> pa.Table:
    """Return one row for each unbroken stretch of an event.

    Args:
        split: its name.
        keys, sources: [N] of the samples.
        classes: C names.
        events: [N, 2, T, C] bool.
    """
    rows = events.transpose(0, 1, 3, 2)
    edges = np.diff(np.pad(rows.astype(np.int8), ((0, 0), (0, 0), (0, 0), (1, 1))), axis=3)
    sample, sense, kind, start = (edges == 1).nonzero()
    end = (edges == -1).nonzero()[3]
    columns = {
        "split": [split] * len(sample),
        "id": sample,
        "key": keys[sample],
        "source": sources[sample],
        "sense": np.array(SENSES)[sense],
        "label": np.array(classes, dtype=object)[kind],
        "start_s": start,
        "end_s": end,
    }
    return pa.table(columns).cast(EVENTS_SCHEMA)


def read_events(path: Path, key: str, split: Split, classes: list[str]) -> np.ndarray:
    """Read a person's or a teacher's table of events for a split: [N, 2, T, C] bool.

    A table made for another set of the same videos, of clips where this one has features, is joined by `source`.

    Args:
        path: a Parquet table with the columns of `EVENTS_SCHEMA`, `key` and, where ids are this set's, `source` aside.
        key: the setting that names it.
        split: whose rows are read.
        classes: C names.

    Raises:
        UserError: for a missing file or column, or a row that does not fit the split.
    """
    if not path.is_file():
        raise UserError(f"{key}={path}: no such file; tools/harvest_labels.py writes such tables.")
    table = read_table(path)
    missing = [name for name in EVENTS_SCHEMA.names if name not in (*table.column_names, "key", "source")]
    if missing:
        raise UserError(
            f"{key}={path}: column '{missing[0]}' is missing; a table of events has {listed(EVENTS_SCHEMA.names)}."
        )
    rows = np.flatnonzero(table.column("split").to_numpy(zero_copy_only=False) == split.name)
    table = table.take(rows)
    if "source" in table.column_names:
        table = _joined(table, split, f"{key}={path}")
    return events_of(table, classes, len(split), segments_of(split), path)


def _joined(table: pa.Table, split: Split, what: str) -> pa.Table:
    """Return the table with this split's ids, and without the videos that the split does not have."""
    sources = split.columns["source"].tolist()
    ids, named = (table.column(name).to_pylist() for name in ("id", "source"))
    if all(
        isinstance(at, int) and 0 <= at < len(sources) and sources[at] == name
        for at, name in zip(ids, named, strict=True)
    ):
        return table
    place = {name: number for number, name in enumerate(sources)}
    if len(place) < len(sources) or not set(named) & set(place):
        raise UserError(
            f"{what}: is of another set, and cannot be joined by source; harvest this set, or name its ids."
        )
    kept = [row for row, name in enumerate(named) if name in place]
    column = pa.array([place[named[row]] for row in kept], pa.int64())
    return table.take(kept).set_column(table.column_names.index("id"), "id", column)


def events_of(table: pa.Table, classes: list[str], num_samples: int, segments: int, path: Path) -> np.ndarray:
    """Return the events of a table: [N, 2, T, C] bool.

    Raises:
        UserError: for a row of no sample, sense, class or second of the set.
    """
    events = np.zeros((num_samples, len(SENSES), segments, len(classes)), dtype=bool)
    kinds = class_numbers(table.column("label").to_pylist(), classes, path)
    columns = (table.column(name).to_pylist() for name in ("id", "sense", "start_s", "end_s"))
    for row, (sample, sense, start, end, kind) in enumerate(zip(*columns, kinds, strict=True)):
        if not (isinstance(sample, int) and 0 <= sample < num_samples and sense in SENSES):
            raise UserError(f"{path}, row {row}: no sample {sample}, or no sense '{sense}'; allowed: {listed(SENSES)}.")
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= segments):
            raise UserError(f"{path}, row {row}: from {start} to {end} s; samples last {segments} s.")
        events[sample, SENSES.index(sense), start:end, kind] = True
    return events
