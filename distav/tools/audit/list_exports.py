"""The listed clips of a multi-label audit in the import formats of FiftyOne and Label Studio, and as a CSV table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.tools.audit.exports import LABEL_STUDIO_FILES, MEDIA, MODEL_VERSION, json_bytes, write_media
from distav.tools.audit.issue_table import csv_bytes
from distav.tools.audit.list_audit import ListAudit

SEPARATOR = "|"


def write_list_export(export_format: str, audit: ListAudit, folder: Path) -> None:
    """Write the listed clips and their issues, and print what was written.

    Args:
        export_format: `fiftyone`, `labelstudio` or `csv`.
        audit: content of the page.
        folder: directory to write; an existing file of the same name is replaced.

    Raises:
        UserError: if the directory cannot be written.
    """
    try:
        (folder / MEDIA).mkdir(parents=True, exist_ok=True)
        clips = export_rows(audit)
        rows = write_media(audit.split, clips, folder)
        files = _FORMATS[export_format](audit, rows)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise UserError(f"--export-dir={folder}: {error.strerror}; choose another directory.") from None
    num_skipped = len(clips) - len(rows)
    skipped = f"; {num_skipped} clips cannot be decoded and are left out" if num_skipped else ""
    print(f"{folder}: {len(rows)} clips for {export_format} in {' and '.join(files)}{skipped}")


def export_rows(audit: ListAudit) -> list[dict[str, Any]]:
    """Return one row per clip with listed issues: its labels, the classes of its issues, and the largest score."""
    issues: dict[int, dict[str, list[int]]] = {}
    scores: dict[int, float] = {}
    for ranked in audit.issues:
        for clip, column, score in zip(ranked.ids.tolist(), ranked.columns.tolist(), ranked.scores, strict=True):
            issues.setdefault(clip, {"missing": [], "wrong": []})[ranked.kind].append(column)
            scores[clip] = max(scores.get(clip, 0.0), float(score))
    return [
        {
            "split": audit.split.name,
            "id": clip,
            "key": str(audit.split.keys[clip]),
            "source": str(audit.split.sources[clip]),
            "score": scores[clip],
            "given": np.flatnonzero(audit.table.given[clip]).tolist(),
            "corrected": np.flatnonzero(audit.table.corrected[clip]).tolist(),
            **issues[clip],
        }
        for clip in sorted(issues)
    ]


def _csv(audit: ListAudit, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return `clips.csv`: path, score, and the lists of given, corrected, missing and wrong labels."""
    lists = ("given", "corrected", "missing", "wrong")
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("path", "key", "source", "score")}
    for name in lists:
        columns[name] = [SEPARATOR.join(audit.classes[index] for index in row[name]) for row in rows]
    schema = pa.schema([(name, pa.float64() if name == "score" else pa.string()) for name in columns])
    return {"clips.csv": csv_bytes(pa.table(columns, schema))}


def _fiftyone(audit: ListAudit, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return a dataset of type `fiftyone.types.FiftyOneDataset`, with the lists as `Classifications`."""
    samples: list[dict[str, Any]] = []
    for row in rows:
        posterior = audit.table.posterior[row["id"]]
        tags = [row["split"], *(kind for kind in ("missing", "wrong") if row[kind])]
        sample: dict[str, Any] = {"filepath": row["path"], "tags": tags}
        for name in ("given", "corrected", "missing", "wrong"):
            labels = [
                {"_cls": "Classification", "tags": [], "label": audit.classes[index], "confidence": float(value)}
                for index, value in zip(row[name], posterior[row[name]], strict=True)
            ]
            sample[name] = {"_cls": "Classifications", "classifications": labels}
        samples.append(sample | {name: row[name] for name in ("key", "source", "score")})
    info = {"classes": audit.classes, "created_by": MODEL_VERSION}
    return {"metadata.json": json_bytes({"info": info}), "samples.json": json_bytes({"samples": samples})}


def _label_studio(audit: ListAudit, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return tasks whose predictions are the corrected lists, and the labeling configuration that they refer to."""
    tasks: list[dict[str, Any]] = []
    for row in rows:
        names = {
            name: [audit.classes[index] for index in row[name]] for name in ("given", "corrected", "missing", "wrong")
        }
        data = {"video": LABEL_STUDIO_FILES + quote(row["path"]), "key": row["key"], "source": row["source"]}
        data |= {name: SEPARATOR.join(values) for name, values in names.items()}
        result: dict[str, Any] = {
            "id": f"{row['key']}-labels",
            "from_name": "labels",
            "to_name": "video",
            "type": "choices",
        }
        result["value"] = {"choices": names["corrected"]}
        prediction = {"model_version": MODEL_VERSION, "score": row["score"], "result": [result]}
        tasks.append({"data": data, "predictions": [prediction]})
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value="given: $given; missing: $missing; wrong: $wrong")
    ElementTree.SubElement(view, "Video", name="video", value="$video")
    choices = ElementTree.SubElement(view, "Choices", name="labels", toName="video", choice="multiple")
    for name in audit.classes:
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return {"tasks.json": json_bytes(tasks), "config.xml": ElementTree.tostring(view, encoding="utf-8") + b"\n"}


_FORMATS: dict[str, Callable[[ListAudit, list[dict[str, Any]]], dict[str, bytes]]] = {
    "fiftyone": _fiftyone,
    "labelstudio": _label_studio,
    "csv": _csv,
}
"""Functions that return the files of an export by name."""
