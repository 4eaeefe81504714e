"""From candidates to a finished set, in two steps that can both be interrupted.

First, workers encode candidates in chunks into `.work`; a chunk is finished when its JSON list is there. Then the
clips are shuffled, numbered and copied into tars; a tar is finished when it has its name. Randomness hangs on the seed
and on the place of a candidate in the list alone, so the bytes are the same for any number of workers or restarts.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav import __version__
from distav.data.format import (
    AUDIO_EXTENSION,
    INDEX_SCHEMA,
    TABLES,
    VIDEO_EXTENSIONS,
    write_atomically,
    write_dali_index,
    write_table,
)
from distav.data.noise import LabelNoise, flip_labels, mismatch_pairs
from distav.data.tar import by_key
from distav.errors import UserError
from distav.making.chunks import Encoded, encode_all
from distav.making.clips import Encoding
from distav.making.sources import Source
from distav.sealing import described

CHUNK = 64
"""Candidates encoded as one piece of work."""


@dataclass(frozen=True)
class Plan:
    """Everything besides the source that decides the bytes of a set."""

    encoding: Encoding
    seed: int = 0
    shard_samples: int = 1000
    label_noise: LabelNoise | None = None
    correspondence_noise: float = 0.0
    cross_class: bool = False

    def __post_init__(self) -> None:
        if self.shard_samples < 1:
            raise UserError(f"--shard-samples={self.shard_samples}: has to be 1 or more.")
        if not 0 <= self.correspondence_noise <= 1:
            raise UserError(f"--correspondence-noise={self.correspondence_noise}: has to be a rate from 0 to 1.")


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    clips: dict[str, int]
    rejected: int
    seconds: float


def make_set(source: Source, out: Path, plan: Plan, workers: int) -> Outcome:
    """Write a whole set into a folder; called again after a kill, it goes on where it was.

    Args:
        source: where clips come from.
        out: the folder of the set.
        plan: encoding, noise, seed.
        workers: processes that encode.

    Raises:
        UserError: where the folder holds another set, or no candidate could be used.
    """
    recipe = {"distav": __version__, "source": _described(source), "plan": _described(plan)}
    work = out / ".work"
    if (out / "manifest.json").exists():
        made = json.loads((out / "manifest.json").read_text())
        if made.get("recipe") != recipe:
            raise UserError(f"{out} holds a set made with other arguments; choose another folder or delete it.")
        return Outcome({name: split["clips"] for name, split in made["splits"].items()}, made["rejected"], 0.0)
    _claim(work, recipe)
    candidates = source.candidates()
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    encoded, rejected, seconds = encode_all(source, plan.encoding, plan.seed, chunks, work, workers)
    _write_rejected(out, rejected)
    if not encoded:
        raise UserError(
            f"none of {len(candidates)} candidates could be used; {out / 'rejected.csv'} gives the reasons."
        )
    manifest = _assemble(encoded, out, work, plan)
    tables = {name: described(out / name) for name in TABLES}
    manifest |= {"recipe": recipe, "rejected": len(rejected), "tables": tables}
    write_atomically(out / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    shutil.rmtree(work)
    return Outcome({name: split["clips"] for name, split in manifest["splits"].items()}, len(rejected), seconds)


def _described(thing: Any) -> Any:
    """Return a source or plan as JSON values, with its type."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {each.name: _described(getattr(thing, each.name)) for each in dataclasses.fields(thing)}
        return {"type": type(thing).__name__} | fields
    return str(thing) if isinstance(thing, Path) else thing


def _claim(work: Path, recipe: dict[str, Any]) -> None:
    """Take the work folder, or make sure that it belongs to the same recipe."""
    path = work / "recipe.json"
    text = json.dumps(recipe, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise UserError(
            f"{work.parent} holds an unfinished set made with other arguments; repeat those, choose another folder, "
            f"or delete {work.parent}."
        )
    strange = next(work.parent.glob("*.tar"), None)
    if strange and not path.exists():
        raise UserError(f"{strange} is of another set, whose manifest.json is missing; choose another folder.")
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _write_rejected(out: Path, rejected: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "start_s", "end_s", "label", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rejected)
    write_atomically(out / "rejected.csv", text.getvalue().encode())


def _assemble(encoded: list[Encoded], out: Path, work: Path, plan: Plan) -> dict[str, Any]:
    """Shuffle, number and copy the encoded clips into tars; write the tables; return the manifest."""
    classes = sorted({each.label for each in encoded})
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    for place, name in enumerate(sorted({each.split for each in encoded})):
        rng = np.random.default_rng([plan.seed, 3, place])
        clips = [each for each in encoded if each.split == name]
        clips = [clips[number] for number in rng.permutation(len(clips))]
        noisy = name == "train"
        true = np.array([classes.index(each.label) for each in clips], dtype=np.int64)
        swapped = plan.correspondence_noise if noisy else 0.0
        pair = mismatch_pairs(len(clips), swapped, rng, true if plan.cross_class else None)
        shards = []
        for number, start in enumerate(range(0, len(clips), plan.shard_samples)):
            path = out / f"{name}-{number:06d}.tar"
            ids = range(start, min(start + plan.shard_samples, len(clips)))
            if not path.exists():
                _write_tar(path, name, ids, clips, pair, plan.encoding, work)
            members = by_key(path)
            write_dali_index(path, members)
            index += _index_rows(name, number, ids, clips, pair, members, plan.encoding)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shards.append({"name": path.name, "clips": len(ids), "bytes": path.stat().st_size, "sha256": digest})
        splits[name] = {"clips": len(clips), "shards": shards}
        flips = plan.label_noise if noisy else None
        given = flip_labels(true, len(classes), flips, rng) if flips else true
        labels.append(_label_table(name, clips, np.array(classes, dtype=object), given, true, pair))
        if noisy and (flips or plan.correspondence_noise):
            splits[name]["noise"] = {
                "label_rate": float((given != true).mean()),
                "correspondence_rate_nominal": float((pair != np.arange(len(pair))).mean()),
                "correspondence_rate_semantic": float((true[pair] != true).mean()),
            }
    columns = {field.name: [row[field.name] for row in index] for field in INDEX_SCHEMA}
    write_table(out / "index.parquet", pa.table(columns, schema=INDEX_SCHEMA))
    write_table(out / "labels.parquet", _with_truth(pa.concat_tables(labels), plan))
    settings = plan.encoding
    return {
        "format": 1,
        "classes": classes,
        "codec": settings.codec,
        "fps": settings.fps,
        "clip_s": settings.clip_s,
        "sample_rate_hz": settings.sample_rate_hz,
        "splits": splits,
    }


def _with_truth(table: pa.Table, plan: Plan) -> pa.Table:
    """Leave out the columns of truth where no noise was injected."""
    table = table if plan.label_noise else table.drop_columns(["true_label"])
    return table if plan.correspondence_noise else table.drop_columns(["pair_id"])


def _label_table(
    split: str, clips: list[Encoded], names: np.ndarray, given: np.ndarray, true: np.ndarray, pair: np.ndarray
) -> pa.Table:
    ids = range(len(clips))
    return pa.table(
        {
            "split": [split] * len(clips),
            "id": np.arange(len(clips)),
            "key": [_key(split, number) for number in ids],
            "label": names[given],
            "true_label": names[true],
            "pair_id": pair,
        }
    )


def _key(split: str, number: int) -> str:
    return f"{split}-{number:09d}"


def _write_tar(
    path: Path, split: str, ids: range, clips: list[Encoded], pair: np.ndarray, encoding: Encoding, work: Path
) -> None:
    """Write one shard beside its place and rename it."""
    import webdataset.writer  # It brings torch along, which the encoding processes have no use for.

    part = work / path.name
    whose = {"mtime": 0, "user": "distav", "group": "distav"}
    with open(part, "wb") as file, webdataset.writer.TarWriter(file, encoder=False, **whose) as tar:
        for number in ids:
            clip, donor = clips[number], clips[pair[number]]
            video, sound = clip.video(work), donor.audio(work)
            extension = VIDEO_EXTENSIONS[encoding.codec]
            facts = {
                "id": number,
                "source": clip.source,
                "start_s": clip.start_s,
                "duration_s": encoding.clip_s,
                "fps": encoding.fps,
                "frames": encoding.num_frames,
                "sample_rate_hz": encoding.sample_rate_hz,
                "sha256": {
                    extension: hashlib.sha256(video).hexdigest(),
                    AUDIO_EXTENSION: hashlib.sha256(sound).hexdigest(),
                },
            }
            tar.write(
                {
                    "__key__": _key(split, number),
                    extension: video,
                    AUDIO_EXTENSION: sound,
                    "json": json.dumps(facts, sort_keys=True).encode(),
                }
            )
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _index_rows(
    split: str,
    shard: int,
    ids: range,
    clips: list[Encoded],
    pair: np.ndarray,
    members: dict[str, list[tuple[str, int, int]]],
    encoding: Encoding,
) -> list[dict[str, Any]]:
    rows = []
    for number in ids:
        key, clip, donor = _key(split, number), clips[number], clips[pair[number]]
        places = {extension: (offset, size) for extension, offset, size in members[key]}
        video, audio = places[VIDEO_EXTENSIONS[encoding.codec]], places[AUDIO_EXTENSION]
        rows.append(
            {
                "split": split,
                "id": number,
                "key": key,
                "shard": shard,
                "source": clip.source,
                "start_s": clip.start_s,
                "duration_s": encoding.clip_s,
                "frames": encoding.num_frames,
                "width": clip.width,
                "height": clip.height,
                "video_offset": video[0],
                "video_bytes": video[1],
                "video_crc32": clip.video_crc32,
                "audio_offset": audio[0],
                "audio_bytes": audio[1],
                "audio_crc32": donor.audio_crc32,
            }
        )
    return rows
