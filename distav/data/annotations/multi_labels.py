"""Label lists: several classes per clip, tables that replace them, and true lists (for evaluation only).

Legend: N samples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError, format_list
from distav.data.annotations.labels import class_index, multi_labels, read_overrides, stored_labels
from distav.data.dataset import ShardedDataset, Split

LABEL_SEPARATOR = "|"
"""Separates the classes of a clip in a text."""
LABEL_SEPARATORS = ("|", ";")
"""Separators that lists of clips may use."""
ONE_LABEL_TABLE = (
    "the table is of a dataset with one label per clip, and clips of this dataset may have several; use {}"
)
"""Message about a table of the other kind of dataset."""


@dataclass(frozen=True)
class MultiLabels:
    """Label lists of one split.

    Attributes:
        classes: class names.
        given: [N, C] bool, possibly with missing and wrong labels.
        true: [N, C] bool; None if the dataset does not store them. Used by evaluation only.
    """

    classes: list[str]
    given: np.ndarray
    true: np.ndarray | None = None

    @property
    def reference(self) -> np.ndarray:
        """The true labels if they are stored, otherwise the given labels: [N, C] bool."""
        return self.given if self.true is None else self.true


def load_multi_labels(shards: ShardedDataset, split: Split, override: str = "") -> MultiLabels:
    """Read the label lists of a split; a user's table may replace given lists.

    Args:
        shards: a multi-label dataset.
        split: its split.
        override: .parquet or .csv table with `id` or `key`, and `label` or `corrected_label`; empty: none. The labels
            are lists, or texts with the separator `|`. A row with an empty text changes nothing.

    Raises:
        UserError: for unknown or repeated classes, unknown ids or keys, or an invalid table.
    """
    path = shards.root / "labels.parquet"
    given = class_matrix(multi_labels(shards, split), shards.classes, str(path))
    table, true = stored_labels(shards, split), None
    if "true_label" in table.column_names and not table.column("true_label").null_count:
        lists = table.column("true_label").to_pylist()
        if not all(isinstance(names, list) for names in lists):
            raise UserError(f"{path}: column 'true_label' does not contain lists of classes; make the dataset again.")
        true = class_matrix(lists, shards.classes, str(path))
    if override:
        given = _replace_lists(Path(override), split, shards.classes, given)
    return MultiLabels(shards.classes, given, true)


def class_matrix(lists: Sequence[Sequence[Any]], classes: list[str], where: str) -> np.ndarray:
    """Return which classes each list contains, [N, C] bool.

    Args:
        lists: N lists of class names.
        classes: C class names.
        where: beginning of an error message.

    Raises:
        UserError: for an unknown class, or one that a list contains twice.
    """
    index = {name: number for number, name in enumerate(classes)}
    matrix = np.zeros((len(lists), len(classes)), dtype=bool)
    for row, names in enumerate(lists):
        for name in names:
            column = index.get(name) if isinstance(name, str) else None
            if column is None:
                column = class_index(name, classes, where)  # Raises the error with the allowed names.
            if matrix[row, column]:
                raise UserError(f"{where}: class '{name}' occurs twice in the labels {format_list(names)}; keep one.")
            matrix[row, column] = True
    return matrix


def label_lists(matrix: np.ndarray, classes: Sequence[str]) -> list[list[str]]:
    """Return the class names of each row of a matrix [N, C] bool."""
    return [[classes[column] for column in np.flatnonzero(row).tolist()] for row in matrix]


def split_label_text(text: str, separator: str, where: str) -> tuple[str, ...]:
    """Return the class names in a text such as `dog|rain`.

    Args:
        text: the names; whitespace around them is removed.
        separator: one of `LABEL_SEPARATORS`.
        where: beginning of an error message.

    Raises:
        UserError: for an empty or repeated name, or one that contains another separator.
    """
    names = tuple(name.strip() for name in text.split(separator))
    for position, name in enumerate(names):
        if not name:
            raise UserError(f"{where}: label '{text}' has an empty name; write one '{separator}' between two names.")
        if name in names[:position]:
            raise UserError(f"{where}: label '{text}' has the class '{name}' twice; keep one.")
        if other := next((character for character in LABEL_SEPARATORS if character in name), None):
            raise UserError(
                f"{where}: class name '{name}' contains '{other}'; the names of a clip are separated by '{separator}', "
                f"and {format_list(LABEL_SEPARATORS)} are not allowed in a name."
            )
    return names


def _replace_lists(path: Path, split: Split, classes: list[str], given: np.ndarray) -> np.ndarray:
    """Return the given lists after applying a user's table; rows without a label change nothing."""
    table, rows = read_overrides(path, split)
    if "knn_label" in table.columns:
        hint = ONE_LABEL_TABLE.format("labels/PHASE.parquet of a run on this dataset")
        raise UserError(f"{table.name}: column 'knn_label': {hint}.")
    replaced = given.copy()
    for value, sample, where in rows:
        names = value if isinstance(value, list) else split_label_text(str(value), LABEL_SEPARATOR, where)
        replaced[sample] = class_matrix([names], classes, where)[0]
    return replaced


def multi_label_correction_table(
    split: Split, labels: MultiLabels, corrected: np.ndarray, held_out: np.ndarray, posterior: np.ndarray
) -> pa.Table:
    """Return the table of a label correction, one row per sample, with lists in the order of the classes.

    Args:
        split: the split.
        labels: its given labels.
        corrected: [N, C] bool, classes after correction.
        held_out: [N, C] probability of each class under held-out votes.
        posterior: [N, C] probability of each class given the votes and the given labels.
    """
    probs = pa.list_(pa.float32())
    names = pa.list_(pa.string())
    return pa.table(
        {
            "id": np.arange(len(split)),
            "key": split.keys,
            "given_label": pa.array(label_lists(labels.given, labels.classes), names),
            "corrected_label": pa.array(label_lists(corrected, labels.classes), names),
            "held_out": pa.array(list(held_out.astype(np.float32)), probs),
            "posterior": pa.array(list(posterior.astype(np.float32)), probs),
        }
    )
