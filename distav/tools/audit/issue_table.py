"""The issue table: one row per clip, with the issues of every type and their scores.

Legend: N training clips, M test clips, R = N + M rows.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from distav.data.files import write_atomically, write_table
from distav.tools.audit.data_issues import DataIssues

TABLE_NAME = "issues"


def issue_table(data: DataIssues) -> pa.Table:
    """Return the issues of all training and test clips.

    Columns: `split`, `id`, `key`, `source`, `label`, `corrected_label`; for each type a column `TYPE_issue` (bool) and
    `TYPE_score`; and what the issue is: `duplicate_of`, `duplicate_modality`, `duplicate_group`, `leak_of`,
    `leak_reason`, `silent`, `black`, `still`, `unreadable`. Only leaks are searched in test clips; their other columns
    are null.
    """
    keys, num_train = data.keys, len(data.train)
    flags = {ranked.kind: _flags(ranked.ids, num_train) for ranked in data.issues}
    duplicated = data.matches.ids[:num_train] >= 0
    groups = data.duplicate_groups
    columns: dict[str, Any] = {
        "split": [data.train.name] * num_train + [data.test.name if data.test else ""] * (len(keys) - num_train),
        "id": np.concatenate([np.arange(num_train), np.arange(len(keys) - num_train)]),
        "key": keys,
        "source": data.sources,
        "label": data.given_labels,
        "corrected_label": _padded(data.table.column("corrected_label").to_pylist(), len(keys)),
    }
    scores = {
        "label": 1 - data.table.column("self_confidence").to_numpy().astype(np.float64),
        "pair": 1 - data.table.column("correspondence").to_numpy().astype(np.float64),
        "duplicate": np.where(duplicated, data.matches.cosines[:num_train], 0.0),
        "off_topic": data.off_topic_scores,
    }
    details: dict[str, dict[str, list[Any]]] = {
        "duplicate": {
            "duplicate_of": [keys[match] if match >= 0 else None for match in data.matches.ids[:num_train]],
            "duplicate_modality": [name or None for name in data.matches.modalities[:num_train]],
            "duplicate_group": [int(group) if group >= 0 else None for group in groups],
        }
    }
    for kind in ("label", "pair", "duplicate", "leak", "off_topic"):
        if kind == "leak":
            columns |= {
                "leak_issue": data.leaks.partners >= 0,
                "leak_score": data.leaks.scores.astype(np.float32),
                "leak_of": [keys[partner] if partner >= 0 else None for partner in data.leaks.partners],
                "leak_reason": [reason or None for reason in data.leaks.reasons],
            }
            continue
        columns[f"{kind}_issue"] = _padded(flags[kind].tolist(), len(keys))
        columns[f"{kind}_score"] = pa.array(_padded(np.asarray(scores[kind]).tolist(), len(keys)), pa.float32())
        columns |= {name: _padded(values, len(keys)) for name, values in details.get(kind, {}).items()}
    columns["duplicate_group"] = pa.array(columns["duplicate_group"], pa.int64())
    columns |= _media_columns(data, flags["media"], len(keys))
    text = ("duplicate_of", "duplicate_modality", "leak_of", "leak_reason", "corrected_label", "unreadable")
    columns |= {name: pa.array(columns[name], pa.string()) for name in text}
    return pa.table(columns)


def _media_columns(data: DataIssues, listed: np.ndarray, num_rows: int) -> dict[str, Any]:
    """Return the columns of the media check; null if the clips were not decoded."""
    num_train, check = len(data.train), data.media
    columns = {"media_issue": listed.tolist(), **{name: values.tolist() for name, values in check.traits.items()}}
    if not check.measured:
        columns = {name: [None] * num_train for name in columns}
    columns = {name: pa.array(_padded(values, num_rows), pa.bool_()) for name, values in columns.items()}
    return columns | {"unreadable": _padded([reason or None for reason in check.unreadable], num_rows)}


def _flags(ids: np.ndarray, num_clips: int) -> np.ndarray:
    flags = np.zeros(num_clips, dtype=bool)
    flags[ids] = True
    return flags


def _padded(values: list[Any], length: int) -> list[Any]:
    return values + [None] * (length - len(values))


def write_issue_table(table: pa.Table, folder: Path) -> list[Path]:
    """Write `issues.parquet` and `issues.csv` atomically; returns their paths."""
    paths = [folder / f"{TABLE_NAME}.parquet", folder / f"{TABLE_NAME}.csv"]
    write_table(paths[0], table)
    write_atomically(paths[1], csv_bytes(table))
    return paths


def csv_bytes(table: pa.Table) -> bytes:
    """Return a table as the content of a CSV file; null is an empty cell."""
    buffer = io.BytesIO()
    csv.write_csv(table, buffer, csv.WriteOptions(quoting_style="needed"))
    return buffer.getvalue()
