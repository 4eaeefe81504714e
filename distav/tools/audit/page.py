"""The audit page: one HTML file that contains its data, frames and audio, and needs no server and no network."""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.console import show_progress
from distav.data.dataset import TEXT_COLUMNS, Split
from distav.data.files import temporary_path
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, ShardReader
from distav.tools.audit.issues import KINDS, Issues, describe_no_issues
from distav.tools.audit.thumbnails import encode_opus, encode_strip

Neighbors = dict[str, tuple[np.ndarray, ...]]
"""By modality: ids [I, k], -1 where there are fewer, and cosine similarities [I, k]."""


@dataclass(frozen=True)
class Audit:
    """Content of an audit page.

    Attributes:
        title: title of the page.
        split: the clips.
        classes: class names.
        table: labels table of the last label correction.
        correction: summary of that correction in report.json.
        issues: ranked issues of each type.
        neighbors: neighbors of the clips of each list of issues.
        facts: additional lines of the overview.
        test: test split, whose clips have the ids after those of `split`; None if no issue refers to a test clip.
        test_labels: given labels of its clips.
    """

    title: str
    split: Split
    classes: list[str]
    table: pa.Table
    correction: dict[str, Any]
    issues: list[Issues]
    neighbors: list[Neighbors]
    facts: dict[str, str]
    test: Split | None = None
    test_labels: list[str] = field(default_factory=list[str])

    def clip_ids(self) -> np.ndarray:
        """Return the sorted ids of all clips on the page: those with issues, their matches and their neighbors."""
        neighbor_ids = [ids.ravel() for neighbors in self.neighbors for ids, _ in neighbors.values()]
        issue_ids = [issues.ids for issues in self.issues]
        matches = [issues.matches for issues in self.issues if issues.matches is not None]
        ids = np.unique(np.concatenate([np.zeros(0, np.int64), *issue_ids, *matches, *neighbor_ids]))
        return ids[ids >= 0]

    def splits(self, clip_ids: np.ndarray) -> list[tuple[Split, np.ndarray]]:
        """Return the sorted clips by split, each with the ids in the split; the training split comes first."""
        first_test = len(self.split)
        parts = [(self.split, clip_ids[clip_ids < first_test])]
        if self.test:
            parts.append((self.test, clip_ids[clip_ids >= first_test] - first_test))
        return parts


@dataclass(frozen=True)
class PageLayout:
    """Parts of a page that depend on the issues.

    Attributes:
        tabs: titles of the lists by kind of issue.
        filters: captions of the filters by class, by name.
        scripts: files with the issues and the decisions.
    """

    tabs: dict[str, str]
    filters: dict[str, str]
    scripts: tuple[str, ...]


LAYOUT = PageLayout(
    {
        "label": "Labels",
        "pair": "Pairs",
        "duplicate": "Duplicates",
        "leak": "Leaks",
        "off_topic": "Off-topic",
        "media": "Silent or black",
    },
    {"given": "Given", "proposed": "Proposed"},
    ("decisions.js", "page.js"),
)


def write_page(audit: Audit, path: Path, height: int) -> None:
    """Write the page atomically.

    Args:
        audit: content of the page.
        path: the file.
        height: height of a frame in pixels.
    """
    write_document(path, LAYOUT, _page_data(audit), encode_media(audit.splits(audit.clip_ids()), height))


def write_document(path: Path, layout: PageLayout, data: dict[str, Any], media: Iterable[str]) -> None:
    """Write a page atomically.

    Args:
        path: the file.
        layout: parts that depend on the issues.
        data: the JSON object that the scripts read.
        media: elements with the media of the clips.
    """
    names = ("page.html", "page.css", "review.js", "media.js", *layout.scripts)
    html, style, *scripts = (files("distav.tools.audit").joinpath(name).read_text() for name in names)
    tabs = "\n".join(
        f'    <button role="tab" data-view="{name}">{title} <span></span></button>'
        for name, title in layout.tabs.items()
    )
    filters = "\n".join(
        f'      <label>{title} <select name="{name}"></select></label>' for name, title in layout.filters.items()
    )
    before, after = html.replace("<!--TABS-->", tabs).replace("<!--FILTERS-->", filters).split("<!--MEDIA-->")
    # The data contains arbitrary names, which must not open a tag inside the script element.
    content = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    before = before.replace("/*STYLE*/", style).replace("/*DATA*/", content)
    partial = temporary_path(path)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(before)
        for line in media:
            file.write(line)
        file.write(after.replace("/*SCRIPT*/", "\n".join(scripts)))
    os.replace(partial, path)


def encode_media(parts: Sequence[tuple[Split, np.ndarray]], height: int) -> Iterator[str]:
    """Yield an inert script element for the frames and for the audio of every clip that has them, if decodable.

    Args:
        parts: splits, and the clips of each.
        height: height of a frame in pixels.
    """
    index = 0
    with show_progress(sum(len(ids) for _, ids in parts), "clips", "encoding clips") as encoding:
        for split, samples in parts:
            reader = ShardReader(split)
            try:
                for sample in samples.tolist():
                    for medium, content in _encode(reader, sample, height).items():
                        text = base64.b64encode(content).decode()
                        yield f'<script type="text/plain" id="{medium}{index}">{text}</script>\n'
                    index += 1
                    encoding.advance()
            finally:
                reader.close()


def _encode(reader: ShardReader, sample: int, height: int) -> dict[str, bytes]:
    """Return the frames and the audio of a clip for the page; empty if it cannot be decoded."""
    try:
        frames, audio = decode_clip(reader.read(sample))
    except (CorruptSampleError, DecodeError):
        return {}
    media: dict[str, bytes] = {}
    if frames is not None:
        media["frames"] = encode_strip(frames, height)
    if audio is not None:
        media["audio"] = encode_opus(audio, reader.split.sample_rate_hz)
    return media


def _page_data(audit: Audit) -> dict[str, Any]:
    """Return the JSON object of the page; clips are referred to by their index among those shown."""
    clip_ids = audit.clip_ids()
    class_index = {name: index for index, name in enumerate(audit.classes)}
    given, knn, corrected = (
        np.array(
            [class_index[name] for name in audit.table.column(column).to_pylist() + audit.test_labels], dtype=np.int64
        )
        for column in ("given_label", "knn_label", "corrected_label")
    )
    confusion = np.zeros((len(audit.classes),) * 2, dtype=np.int64)
    num_train = len(audit.split)
    np.add.at(confusion, (given[:num_train], corrected[:num_train]), 1)
    parts = audit.splits(clip_ids)

    def stored(column: str) -> list[Any]:
        columns = [(split.texts if column in TEXT_COLUMNS else split.columns)[column] for split, _ in parts]
        return [
            value for values, (_, samples) in zip(columns, parts, strict=True) for value in values[samples].tolist()
        ]

    rates_by_class = audit.correction["label_noise_rate_by_class"]
    skipped = [issues.kind for issues in audit.issues if issues.total is None]
    return {
        "title": audit.title,
        "digest": digest_of(audit.table, ("key", "given_label", "knn_label")),
        "classes": audit.classes,
        "totals": {issues.kind: issues.total for issues in audit.issues},
        "no_issues": {kind: describe_no_issues(kind, bool(rates_by_class), kind not in skipped) for kind in KINDS},
        "facts": list(audit.facts.items()),
        # Rates are estimated only if the votes carry information on the labels.
        "rates": {
            "labels": audit.correction["label_noise_rate"] if rates_by_class else None,
            "pairs": audit.correction["pair_mismatch_rate"] if rates_by_class else None,
            "classes": rates_by_class,
        },
        "counts": {"given": confusion.sum(1).tolist(), "corrected": confusion.sum(0).tolist()},
        "confusion": confusion.tolist(),
        "clips": {
            "key": stored("key"),
            "source": [str(source) for source in stored("source")],
            "start_s": stored("start_s"),
            "given_label": given[clip_ids].tolist(),
            "knn_label": knn[clip_ids].tolist(),
            "corrected_label": corrected[clip_ids].tolist(),
            **{
                name: [bool(has) for split, samples in parts for has in split.has_modality(modality)[samples]]
                for name, modality in (("has_frames", "visual"), ("has_audio", "audio"))
            },
        },
        "issues": _issue_columns(audit, clip_ids),
    }


def neighbor_columns(neighbors: Neighbors, clip_ids: np.ndarray) -> dict[str, list[Any]]:
    """Return by modality the neighbors of each issue, as pairs of index on the page and cosine similarity."""
    return {
        modality: [
            [
                [int(np.searchsorted(clip_ids, neighbor)), round(float(cosine), 4)]
                for neighbor, cosine in zip(row_ids, row_cosines, strict=True)
                if neighbor >= 0
            ]
            for row_ids, row_cosines in zip(ids, cosines, strict=True)
        ]
        for modality, (ids, cosines) in neighbors.items()
    }


def _issue_columns(audit: Audit, clip_ids: np.ndarray) -> dict[str, list[Any]]:
    """Return the columns of the issues of all types, one after the other."""
    columns: dict[str, list[Any]] = {name: [] for name in ("kind", "clip", "score", "note", "match", "visual", "audio")}
    for issues, neighbors in zip(audit.issues, audit.neighbors, strict=True):
        columns["kind"] += [issues.kind] * len(issues.ids)
        columns["clip"] += np.searchsorted(clip_ids, issues.ids).tolist()
        columns["score"] += issues.scores.tolist()
        columns["note"] += issues.notes or [""] * len(issues.ids)
        matches = np.full(len(issues.ids), -1) if issues.matches is None else issues.matches
        columns["match"] += np.where(matches < 0, -1, np.searchsorted(clip_ids, matches)).tolist()
        for modality, rows in neighbor_columns(neighbors, clip_ids).items():
            columns[modality] += rows
    return columns


def digest_of(table: pa.Table, columns: Sequence[str]) -> str:
    """Return a digest of some columns, under which the browser stores the decisions."""
    text = json.dumps([table.column(name).to_pylist() for name in columns])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
