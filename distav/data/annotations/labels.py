"""Label tables: the given labels, tables a person brings, and the truth (for evaluation alone)."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import check_column_names, read_table


@dataclass(frozen=True)
class Labels:
    """The labels of one split.

    Attributes:
        given: [N] int64 class numbers, possibly wrong.
        true: [N] int64, or None where the set carries no truth. Only evaluation reads it.
        pair_id: [N] int64 id of the clip whose sound each clip carries, or None. Only evaluation reads it.
    """

    classes: list[str]
    given: np.ndarray
    true: np.ndarray | None = None
    pair_id: np.ndarray | None = None

    def mismatched(self) -> np.ndarray | None:
        """Which pairs are wrong for recognition: [N] bool, sound of another true class; None without truth."""
        if self.pair_id is None:
            return None
        truth = self.given if self.true is None else self.true
        return truth[self.pair_id] != truth


def load_labels(shards: ShardedDataset, split: Split, override: str = "") -> Labels:
    """Read the labels of a split, and replace the given ones by a user's table where one is named.

    Args:
        shards: the set.
        split: its split.
        override: path of a .parquet or .csv table with `id` or `key` and `label`; empty for none, as it has to be
            in a set whose clips have several classes, of which every combination is one here.

    Raises:
        UserError: for labels outside the classes of the set, ids or keys it does not have, or a broken table.
    """
    if shards.multi_label:
        if override:
            raise UserError(
                f"data.label_overrides={override}: clips of {shards.root} have several classes each; leave it empty."
            )
        return _combinations(shards, split)
    path = shards.root / "labels.parquet"
    table = _own_table(shards, split)

    def numbers(name: str) -> np.ndarray | None:
        if name not in table.column_names or table.column(name).null_count:
            return None
        return class_indices(table.column(name).to_pylist(), shards.classes, path)

    given = numbers("label")
    if given is None:
        raise UserError(f"{path}: column 'label' is missing or has gaps.")
    pair = table.column("pair_id").to_numpy() if "pair_id" in table.column_names else None
    if override:
        given = _apply(Path(override), split, shards.classes, given)
    return Labels(shards.classes, given, numbers("true_label"), pair)


def _own_table(shards: ShardedDataset, split: Split) -> pa.Table:
    """Return the set's table of labels for a split, with a row for each of its ids, in order."""
    path = shards.root / "labels.parquet"
    table = shards.table("labels.parquet", split.name)
    if "id" not in table.column_names or not pa.types.is_integer(table.schema.field("id").type):
        raise UserError(f"{path}: column 'id' is missing or does not hold whole numbers.")
    ids = table.column("id").to_numpy()
    if not np.array_equal(ids, np.arange(len(split))):
        raise UserError(
            f"{path}: split {split.name} has {len(ids)} labels for {len(split)} samples, or ids in disorder."
        )
    return table


def multi_labels(shards: ShardedDataset, split: Split) -> list[list[str]]:
    """Return the classes of every clip of a set whose clips may have several.

    Raises:
        UserError: where the set's table does not hold a list for each clip.
    """
    table = _own_table(shards, split)
    if "label" not in table.column_names or not pa.types.is_list(table.schema.field("label").type):
        raise UserError(
            f"{shards.root / 'labels.parquet'}: column 'label' is missing or does not hold lists of classes."
        )
    return [each or [] for each in table.column("label").to_pylist()]


def _combinations(shards: ShardedDataset, split: Split) -> Labels:
    """Take every combination of classes that occurs for a class of its own."""
    names = [", ".join(sorted(map(str, each))) for each in multi_labels(shards, split)]
    classes, given = np.unique(np.array(names, dtype=object), return_inverse=True)
    table = _own_table(shards, split)
    pair = table.column("pair_id").to_numpy() if "pair_id" in table.column_names else None
    return Labels([str(each) for each in classes], given.astype(np.int64), None, pair)


def _apply(path: Path, split: Split, classes: list[str], given: np.ndarray) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"data.label_overrides={path}: no such file.")
    try:
        table = read_csv(path) if path.suffix == ".csv" else read_table(path)
        names = table.column_names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data.label_overrides={path} cannot be read as csv: {str(error).splitlines()[0]}") from None
    name = next((each for each in ("corrected_label", "label") if each in names), None)
    if name is None or not {"id", "key"} & set(names):
        raise UserError(f"data.label_overrides={path}: needs `id` or `key`, and `label`; found: {format_list(names)}.")
    if "key" in names:
        row_of = {key: row for row, key in enumerate(split.keys.tolist())}
        wanted = table.column("key").to_pylist()
        unknown = [key for key in wanted if key not in row_of]
        rows = [row_of.get(key, 0) for key in wanted]
    else:
        rows = table.column("id").to_pylist()
        unknown = [row for row in rows if not isinstance(row, int) or not 0 <= row < len(split)]
    if unknown:
        raise UserError(
            f"data.label_overrides={path}: {len(unknown)} rows name samples that split {split.name} does not have: "
            f"{format_list(unknown, 3)}. Take a table made for this set."
        )
    replaced, names = given.copy(), table.column(name).to_pylist()
    told = [row for row, label in enumerate(names) if label not in (None, "")]  # Without a label, the given one stays.
    replaced[np.asarray(rows, dtype=np.int64)[told]] = class_indices([names[row] for row in told], classes, path)
    return replaced


def read_csv(path: Path) -> pa.Table:
    """Read a table whose columns are text, numbers in `id` excepted: a class may be named 7, or null."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    types = {name: pa.int64() if name == "id" else pa.string() for name in names}
    return check_column_names(pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types)))


def class_indices(names: list[str], classes: list[str], path: Path) -> np.ndarray:
    """Return the numbers of classes by name: [N] int64.

    Raises:
        UserError: for a name that is none of the classes, with the file that holds it.
    """
    number = {name: position for position, name in enumerate(classes)}
    unknown = sorted({str(name) for name in names if name not in number})
    if unknown:
        raise UserError(
            f"{path}: unknown class '{unknown[0]}'; allowed: {format_list(classes)}.{did_you_mean(unknown[0], classes)}"
        )
    return np.array([number[name] for name in names], dtype=np.int64)


def correction_table(
    split: Split,
    labels: Labels,
    corrected: np.ndarray,
    knn_labels: np.ndarray,
    confidence: np.ndarray,
    self_confidence: np.ndarray,
    correspondence: np.ndarray,
) -> pa.Table:
    """Return what a correction phase learned, one row a sample: the table a person opens to clean the set.

    Args:
        split: the split.
        labels: its given labels.
        corrected: [N] int64 classes, the given label and the votes taken together.
        voted: [N] int64 classes by the votes alone.
        confidence: [N] float32 probability of the corrected class.
        agreement: [N] float32 share of the votes for the given class.
        correspondence: [N] float32 estimated probability that sound and picture belong together.
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
