"""One self-contained page: data, pictures and sounds inside it, no server and no network."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from distav.data.dataset import Split
from distav.data.files import temporary_path
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, ShardReader
from distav.tools.audit.issues import Issues
from distav.tools.audit.thumbnails import small_sound, strip

Neighbors = dict[str, tuple[np.ndarray, ...]]
"""By modality: ids [p, k], -1 where there are fewer, and cosines [p, k]."""


@dataclass(frozen=True)
class Audit:
    """What a page shows.

    Attributes:
        title: of the page.
        split: the clips.
        classes: their names.
        table: what the last correction found of each clip.
        found: correction's summary in report.json.
        problems: lists of what looks wrong.
        neighbors: of the clips of each list.
        facts: further lines of the overview.
    """

    title: str
    split: Split
    classes: list[str]
    table: pa.Table
    found: dict[str, Any]
    issues: list[Issues]
    neighbors: list[Neighbors]
    facts: dict[str, str]

    def shown(self) -> np.ndarray:
        """Return the ids of all clips on the page, problems and neighbours, in order."""
        near = [ids.ravel() for each in self.neighbors for ids, _ in each.values()]
        every = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.ids for each in self.issues), *near]))
        return every[every >= 0]


def write_page(audit: Audit, path: Path, height: int) -> None:
    """Write the page so that it is either whole or not there.

    Args:
        audit: what it shows.
        path: the file.
        height: of a frame, in pixels.
    """
    names = ("page.html", "page.css", "decisions.js", "page.js")
    html, style, *scripts = (files("distav.tools.audit").joinpath(name).read_text() for name in names)
    before, after = html.split("<!--MEDIA-->")
    # Names come from data: in JSON within HTML no tag may begin.
    data = json.dumps(_data(audit), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    before = before.replace("/*STYLE*/", style).replace("/*DATA*/", data)
    part = temporary_path(path)
    with open(part, "w", encoding="utf-8") as file:
        file.write(before)
        for line in _media(audit, height):
            file.write(line)
        file.write(after.replace("/*SCRIPT*/", "\n".join(scripts)))
    os.replace(part, path)


def _media(audit: Audit, height: int) -> Iterator[str]:
    """Yield a script element that is none for every strip of frames and every sound."""
    reader = ShardReader(audit.split)
    try:
        for place, clip in enumerate(tqdm(audit.shown(), unit="clip", desc="pictures and sounds", mininterval=1)):
            try:
                frames, sound = decode_clip(reader.read(int(clip)))
            except (CorruptSampleError, DecodeError):
                continue
            contents = {"f": strip(frames, height), "a": small_sound(sound, audit.split.sample_rate_hz)}
            for kind, content in contents.items():
                text = base64.b64encode(content).decode()
                yield f'<script type="text/plain" id="{kind}{place}">{text}</script>\n'
    finally:
        reader.close()


def _data(audit: Audit) -> dict[str, Any]:
    clips = audit.shown()
    number = {name: place for place, name in enumerate(audit.classes)}
    given, proposed, corrected = (
        np.array([number[name] for name in audit.table.column(column).to_pylist()], dtype=np.int64)
        for column in ("given_label", "knn_label", "corrected_label")
    )
    counts = np.zeros((len(audit.classes),) * 2, dtype=np.int64)
    np.add.at(counts, (given, corrected), 1)
    columns = audit.split.columns
    items: dict[str, list[Any]] = {name: [] for name in ("kind", "clip", "score", "visual", "audio")}
    for problems, near in zip(audit.issues, audit.neighbors, strict=True):
        items["kind"] += [problems.kind] * len(problems.ids)
        items["clip"] += np.searchsorted(clips, problems.ids).tolist()
        items["score"] += problems.scores.tolist()
        for modality, (ids, cosines) in near.items():
            items[modality] += [
                [[int(np.searchsorted(clips, one)), round(float(cosine), 4)] for one, cosine in row if one >= 0]
                for row in (zip(*each, strict=True) for each in zip(ids, cosines, strict=True))
            ]
    by_class = audit.found["label_noise_rate_by_class"]
    return {
        "title": audit.title,
        "digest": _digest(audit.table),
        "classes": audit.classes,
        "found": {problems.kind: problems.total for problems in audit.issues},
        "facts": list(audit.facts.items()),
        # Rates are known where votes said anything of the labels.
        "noise": {
            "labels": audit.found["label_noise"] if by_class else None,
            "pairs": audit.found["pair_mismatch_rate"] if by_class else None,
            "classes": by_class,
        },
        "counts": {"given": counts.sum(1).tolist(), "corrected": counts.sum(0).tolist()},
        "confusion": counts.tolist(),
        "clips": {
            "key": columns["key"][clips].tolist(),
            "source": [str(each) for each in columns["source"][clips]],
            "start_s": columns["start_s"][clips].tolist(),
            "given": given[clips].tolist(),
            "proposed": proposed[clips].tolist(),
            "corrected": corrected[clips].tolist(),
        },
        "items": items,
    }


def _digest(table: pa.Table) -> str:
    text = json.dumps([table.column(name).to_pylist() for name in ("key", "given_label", "knn_label")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
