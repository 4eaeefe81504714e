"""Label tables: given labels, tables that replace them, and true labels (for evaluation only)."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.tables import Table, TableFormat, read_user_table
from distav.data.dataset import ShardedDataset, Split

LISTS_TABLE = "the table is of a multi-label dataset, and clips of this dataset have one label; use {}"
"""Message about a table of the other kind of dataset."""
log = logging.getLogger("distav")

_OVERRIDES = TableFormat("key,label", (), ("key", "id", "label", "corrected_label"), others_allowed=True)


@dataclass(frozen=True)
class Labels:
    """Labels of one split.

    Attributes:
        classes: class names.
        given: [N] int64 class indices, possibly wrong.
        true: [N] int64 class indices; None if the dataset does not store them. Used by evaluation only.
        pair_id: [N] int64, id of the clip from which the audio of each clip was taken, or None. Used by evaluation
            only.
    """

    classes: list[str]
    given: np.ndarray
    true: np.ndarray | None = None
    pair_id: np.ndarray | None = None

    def mismatched(self) -> np.ndarray | None:
        """Mismatched pairs, [N] bool: clips whose audio has another true class; None if pairs are not known."""
        if self.pair_id is None:
            return None
        true = self.given if self.true is None else self.true
        return true[self.pair_id] != true


def load_labels(shards: ShardedDataset, split: Split, override: str = "") -> Labels:
    """Read the labels of a split; a user's table may replace given labels.

    In a multi-label dataset, every combination of classes becomes one class; `multi_labels.load_multi_labels` reads
    its lists.

    Args:
        shards: the dataset.
        split: its split.
        override: .parquet or .csv table with `id` or `key`, and `label` or `corrected_label`; empty: none. Not used
            for a multi-label dataset.

    Raises:
        UserError: for unknown classes, ids or keys, or an invalid table.
    """
    if shards.multi_label:
        return _combination_labels(shards, split)
    path = shards.root / "labels.parquet"
    table = stored_labels(shards, split)

    def indices(column: str) -> np.ndarray | None:
        if column not in table.column_names or table.column(column).null_count:
            return None
        # Each distinct name once, not a Python string for each sample.
        encoded = table.column(column).combine_chunks().dictionary_encode()
        return class_indices(encoded.dictionary.to_pylist(), shards.classes, path)[encoded.indices.to_numpy()]

    given = indices("label")
    if given is None:
        raise UserError(f"{path}: column 'label' is missing or incomplete; make the dataset again.")
    if override:
        given = _replace_labels(Path(override), split, shards.classes, given)
    return Labels(shards.classes, given, indices("true_label"), _pair_ids(table))


def stored_labels(shards: ShardedDataset, split: Split) -> pa.Table:
    """Return the rows of labels.parquet for a split, one per id, in order."""
    path = shards.root / "labels.parquet"
    table = shards.table("labels.parquet", split.name)
    if "id" not in table.column_names or not pa.types.is_integer(table.schema.field("id").type):
        raise UserError(f"{path}: column 'id' is missing or not of integer type; make the dataset again.")
    ids = table.column("id").to_numpy()
    if not np.array_equal(ids, np.arange(len(split))):
        raise UserError(
            f"{path}: split {split.name} has {len(ids)} labels for {len(split)} samples, or ids in the wrong order; "
            "make the dataset again."
        )
    return table


def _pair_ids(table: pa.Table) -> np.ndarray | None:
    return table.column("pair_id").to_numpy() if "pair_id" in table.column_names else None


def multi_labels(shards: ShardedDataset, split: Split) -> list[list[str]]:
    """Return the class names of every clip of a multi-label dataset.

    Raises:
        UserError: if labels.parquet does not store lists.
    """
    table = stored_labels(shards, split)
    if "label" not in table.column_names or not pa.types.is_list(table.schema.field("label").type):
        raise UserError(
            f"{shards.root / 'labels.parquet'}: column 'label' is missing or does not contain lists of classes; make "
            "the dataset again."
        )
    return [names or [] for names in table.column("label").to_pylist()]


def _combination_labels(shards: ShardedDataset, split: Split) -> Labels:
    """Return labels in which every occurring combination of classes is one class."""
    combinations = [", ".join(sorted(map(str, names))) for names in multi_labels(shards, split)]
    classes, given = np.unique(np.array(combinations, dtype=object), return_inverse=True)
    pair_id = _pair_ids(stored_labels(shards, split))
    return Labels([str(name) for name in classes], given.astype(np.int64), None, pair_id)


def _replace_labels(path: Path, split: Split, classes: list[str], given: np.ndarray) -> np.ndarray:
    """Return the given labels after applying a user's table; rows without a label change nothing."""
    replaced = given.copy()
    for label, sample, where in read_overrides(path, split)[1]:
        if isinstance(label, list):
            hint = LISTS_TABLE.format("labels/PHASE.parquet of a run on this dataset")
            raise UserError(f"{where}: label {label}: {hint}.")
        replaced[sample] = class_index(label, classes, where)
    return replaced


def read_overrides(path: Path, split: Split) -> tuple[Table, list[tuple[Any, int, str]]]:
    """Read a table that replaces given labels; logs a warning if rows of it remove their clip, which only `clean` does.

    Returns:
        The table, and for each row with a label: the label, the id of the sample, and the position of the row for error
        messages.

    Raises:
        UserError: for an invalid table, or unknown ids or keys.
    """
    name = f"data.label_overrides={path}"
    table = read_user_table(path, name, _OVERRIDES)
    columns = table.columns
    id_column = next((column for column in ("key", "id") if column in columns), None)
    label_column = next((column for column in ("corrected_label", "label") if column in columns), None)
    if id_column is None or label_column is None:
        raise UserError(f"{name}: needs `id` or `key`, and `label`; found: {format_list(columns)}.")
    ids, no_values = sample_ids(table, id_column, split), [""] * len(table)
    decisions = zip(columns.get("action", no_values), columns.get("pair", no_values), strict=True)
    removals = sum(action == "remove" or pair == "mismatched" for action, pair in decisions)
    if removals and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: %d of %d rows remove their clip (action remove or pair mismatched), but this table only replaces "
            "labels, and all clips are kept. To remove them: make_shards.py clean SHARDS OUT --decisions %s",
            name, removals, len(table), path,
        )  # fmt: skip
    labels = zip(columns[label_column], ids, strict=True)
    return table, [
        (label, sample, table.position(row)) for row, (label, sample) in enumerate(labels) if label not in (None, "")
    ]


def sample_ids(table: Table, column: str, split: Split) -> list[int]:
    """Return the ids of the samples that the rows of a table refer to.

    Args:
        table: the table.
        column: name of the column, `key` or `id`.
        split: the split of the samples.

    Raises:
        UserError: for a sample that the split does not have, or that occurs in more than one row.
    """
    values = table.columns[column]
    if column == "key":
        ids = split.keys.positions(values)
        example = f"keys are {format_list(split.keys, 2)}"
    else:
        ids = [_parse_id(value, len(split)) for value in values]
        example = f"ids are 0 to {len(split) - 1}"
    unknown = [row for row, sample in enumerate(ids) if sample is None]
    if unknown:
        references = [f"{values[row]} ({table.row_unit} {table.row_numbers[row]})" for row in unknown]
        raise UserError(
            f"{table.name}: split {split.name} of {split.root} does not have the samples of {len(unknown)} of "
            f"{len(values)} rows: {format_list(references, 3)}; its {example}. Use a table made for this dataset."
        )
    rows_of: dict[int, list[int]] = {}
    known = [sample for sample in ids if sample is not None]
    for row, sample in enumerate(known):
        rows_of.setdefault(sample, []).append(row)
    for rows in rows_of.values():
        if len(rows) > 1:
            numbers = format_list(table.row_numbers[row] for row in rows)
            raise UserError(
                f"{table.name}: {column} '{values[rows[0]]}' occurs in {len(rows)} rows: {table.row_unit}s {numbers}; "
                "keep one."
            )
    return known


def _parse_id(value: Any, num_samples: int) -> int | None:
    """Return an id given as a number or, in a CSV file, as text; None if no sample has it."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value) if len(value) <= 18 else None
    return value if isinstance(value, int) and 0 <= value < num_samples else None


def class_index(name: Any, classes: list[str], where: str) -> int:
    """Return the index of a class by name.

    Raises:
        UserError: for an unknown class; the message begins with `where`.
    """
    try:
        return classes.index(name)
    except ValueError:
        raise UserError(
            f"{where}: unknown class '{name}'; allowed: {format_list(classes)}.{did_you_mean(name, classes)}"
        ) from None


def class_indices(names: Sequence[Any], classes: list[str], path: Path) -> np.ndarray:
    """Return the indices of classes by name, [N] int64.

    Raises:
        UserError: for an unknown class; the message names the file `path`.
    """
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted({str(name) for name in names if not isinstance(name, str) or name not in index})
    if unknown:
        raise UserError(
            f"{path}: unknown class '{unknown[0]}'; allowed: {format_list(classes)}.{did_you_mean(unknown[0], classes)}"
        )
    return np.array([index[name] for name in names], dtype=np.int64)


def correction_table(
    split: Split,
    labels: Labels,
    corrected: np.ndarray,
    knn_labels: np.ndarray,
    confidence: np.ndarray,
    self_confidence: np.ndarray,
    correspondence: np.ndarray,
) -> pa.Table:
    """Return the table of a label-correction phase for reviewing the dataset, one row per sample.

    Args:
        split: the split.
        labels: its given labels.
        corrected: [N] int64 classes after correction.
        knn_labels: [N] int64 classes predicted by the k-NN votes.
        confidence: [N] float32 probability of the corrected class.
        self_confidence: [N] float32 probability of the given class under held-out votes.
        correspondence: [N] float32 probability that audio and video show the same class.
    """
    names = np.array(labels.classes, dtype=object)
    return pa.table(
        {
            "id": np.arange(len(split)),
            "key": split.keys,
            "given_label": names[labels.given],
            "corrected_label": names[corrected],
            "knn_label": names[knn_labels],
            "confidence": confidence.astype(np.float32),
            "self_confidence": self_confidence.astype(np.float32),
            "correspondence": correspondence.astype(np.float32),
        }
    )
