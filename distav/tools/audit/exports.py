"""The listed clips in the import formats of FiftyOne and Label Studio, and as a CSV table.

Every export has the clips as `media/KEY.mp4`, one file with video and audio, and one entry per clip.
"""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError
from distav.console import show_progress
from distav.data.dataset import Split
from distav.data.files import write_atomically
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, ShardReader
from distav.tools.audit.data_issues import DataIssues
from distav.tools.audit.export_media import write_mp4
from distav.tools.audit.issue_table import csv_bytes
from distav.tools.audit.page import Audit

MEDIA = "media"
LABEL_STUDIO_FILES = "/data/local-files/?d="
"""URL under which Label Studio serves a file below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT."""
MODEL_VERSION = "distav"


@dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
        audit: the page, whose lists determine the clips.
        data: the issues.
        table: table of `issue_table`.
    """

    audit: Audit
    data: DataIssues
    table: pa.Table

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the issue table of the listed training clips, with `issues`, the lists that name them."""
        kinds: dict[int, list[str]] = {}
        for ranked in self.audit.issues:
            for clip in ranked.ids.tolist():
                kinds.setdefault(clip, []).append(ranked.kind)
        clips = sorted(kinds)
        knn_labels = self.data.table.column("knn_label").take(clips).to_pylist()
        rows = self.table.take(clips).to_pylist()
        for row, clip, knn_label in zip(rows, clips, knn_labels, strict=True):
            row |= {"issues": kinds[clip], "knn_label": knn_label}
        return rows


def write_export(export_format: str, export: Export, folder: Path) -> None:
    """Write the listed clips and their issues, and print what was written.

    Args:
        export_format: one of `EXPORT_FORMATS`.
        export: what is exported.
        folder: directory to write; an existing file of the same name is replaced.

    Raises:
        UserError: if the directory cannot be written.
    """
    try:
        (folder / MEDIA).mkdir(parents=True, exist_ok=True)
        rows = write_media(export.audit.split, export.rows(), folder)
        files = EXPORT_FORMATS[export_format](export, rows)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise UserError(f"--export-dir={folder}: {error.strerror}; choose another directory.") from None
    num_skipped = len(export.rows()) - len(rows)
    skipped = f"; {num_skipped} clips cannot be decoded and are left out" if num_skipped else ""
    print(f"{folder}: {len(rows)} clips for {export_format} in {' and '.join(files)}{skipped}")


def write_media(split: Split, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Write the clips and return the rows of those that can be decoded, with their `path` in the folder."""
    written: list[dict[str, Any]] = []
    with closing(ShardReader(split)) as reader, show_progress(len(rows), "clips", "writing clips") as writing:
        for row in rows:
            path = f"{MEDIA}/{row['key']}.mp4"
            writing.advance()
            try:
                frames, audio = decode_clip(reader.read(row["id"]))
            except (CorruptSampleError, DecodeError):
                continue
            write_mp4(folder / path, frames, audio, split.fps, split.sample_rate_hz)
            written.append({**row, "path": path})
    return written


def _csv(export: Export, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return `clips.csv`: path, issues separated by spaces, the proposed label, and the columns of the issue table."""
    schema = pa.schema([("path", pa.string()), ("issues", pa.string()), ("knn_label", pa.string())])
    schema = pa.unify_schemas([schema, export.table.schema])
    table = pa.Table.from_pylist([{**row, "issues": " ".join(row["issues"])} for row in rows], schema)
    return {"clips.csv": csv_bytes(table)}


def _fiftyone(export: Export, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return a dataset of type `fiftyone.types.FiftyOneDataset`: serialized samples, whose schema FiftyOne infers."""
    confidence = export.table.column("label_score").to_pylist()
    numbers = [name for name in export.table.column_names if name.endswith("_score")]
    texts = ("key", "source", "duplicate_of", "duplicate_modality", "leak_of", "leak_reason", "unreadable")
    samples: list[dict[str, Any]] = []
    for row in rows:
        labels = {"given": row["label"], "proposed": row["knn_label"], "corrected": row["corrected_label"]}
        sample: dict[str, Any] = {"filepath": row["path"], "tags": [row["split"], *row["issues"]]}
        sample |= {name: {"_cls": "Classification", "tags": [], "label": label} for name, label in labels.items()}
        sample["given"]["confidence"] = float(1 - confidence[row["id"]])
        sample |= {name: row[name] for name in (*texts, *numbers)}
        samples.append(sample)
    info = {"classes": export.audit.classes, "created_by": MODEL_VERSION}
    return {"metadata.json": json_bytes({"info": info}), "samples.json": json_bytes({"samples": samples})}


def _label_studio(export: Export, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return tasks with predictions, and the labeling configuration that they refer to."""
    tasks = [_label_studio_task(row) for row in rows]
    return {"tasks.json": json_bytes(tasks), "config.xml": _label_studio_config(export.audit.classes)}


def _label_studio_task(row: dict[str, Any]) -> dict[str, Any]:
    names = ("key", "split", "source", "label", "corrected_label", "duplicate_of", "leak_of", "leak_reason")
    scores = {name: row[name] for name in row if name.endswith("_score") and row[name] is not None}
    data = {"video": LABEL_STUDIO_FILES + quote(row["path"]), "issues": " ".join(row["issues"])}
    data |= {name: row[name] or "" for name in names} | scores
    choices = {
        "label": row["knn_label"],
        "pair": "mismatched" if "pair" in row["issues"] else "matched",
        "action": "remove" if set(row["issues"]) - {"label", "pair"} else "keep",
    }
    result = [
        {"id": f"{row['key']}-{name}", "from_name": name, "to_name": "video", "type": "choices"}
        | {"value": {"choices": [choice]}}
        for name, choice in choices.items()
    ]
    score = max(float(row[f"{kind}_score"]) if kind != "media" else 1.0 for kind in row["issues"])
    return {"data": data, "predictions": [{"model_version": MODEL_VERSION, "score": score, "result": result}]}


def _label_studio_config(classes: list[str]) -> bytes:
    """Return the labeling configuration: the clip, its label, whether its pair matches, and whether to remove it."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value="$issues")
    ElementTree.SubElement(view, "Video", name="video", value="$video")
    for name, values in {
        "label": classes,
        "pair": ["matched", "mismatched"],
        "action": ["keep", "remove"],
    }.items():
        ElementTree.SubElement(view, "Header", value=name.capitalize())
        choices = ElementTree.SubElement(view, "Choices", name=name, toName="video", choice="single", showInline="true")
        for value in values:
            ElementTree.SubElement(choices, "Choice", value=value)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="utf-8") + b"\n"


def json_bytes(value: Any) -> bytes:
    """Return a value as the content of a JSON file."""

    def plain(number: Any) -> Any:
        return number.item() if isinstance(number, np.generic) else str(number)

    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=plain) + "\n").encode()


EXPORT_FORMATS: dict[str, Callable[[Export, list[dict[str, Any]]], dict[str, bytes]]] = {
    "fiftyone": _fiftyone,
    "labelstudio": _label_studio,
    "csv": _csv,
}
"""Functions that return the files of an export by name."""
