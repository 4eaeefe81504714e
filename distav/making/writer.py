"""From candidates to a finished set, in two steps that can both be interrupted.

First, workers encode candidates in chunks into `.work`; a chunk is finished when its JSON list is there. Then the
clips are shuffled, numbered and copied into tars; a tar is finished when it has its name. Randomness hangs on the seed
and on the place of a candidate in the list alone, so the bytes are the same for any number of workers or restarts.
"""

import csv
import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav import __version__
from distav.data.events import events_table
from distav.data.format import EVENTS, TABLES, index_schema, members_of, write_atomically, write_table
from distav.data.llp import SECONDS
from distav.data.noise import LabelNoise, flip_labels, mismatch_pairs
from distav.errors import UserError
from distav.making.chunks import Encoded, encode_all
from distav.making.clips import Encoding
from distav.making.events import About, EventSource
from distav.making.sources import Source
from distav.making.tars import Samples, key_of
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
    about = source.about() if isinstance(source, EventSource) else About()
    if isinstance(source, EventSource) and plan.encoding.clip_s != SECONDS:
        raise UserError(f"--clip-s={plan.encoding.clip_s:g}: the annotations are of {SECONDS} s; leave it out.")
    if about.several and (plan.label_noise or plan.cross_class):
        raise UserError("--label-noise and --cross-class are for one class a sample; these have several.")
    _claim(work, recipe)
    candidates = source.candidates()
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    encoded, rejected, seconds = encode_all(source, plan.encoding, plan.seed, chunks, work, workers)
    _write_rejected(out, rejected)
    if not encoded:
        raise UserError(
            f"none of {len(candidates)} candidates could be used; {out / 'rejected.csv'} gives the reasons."
        )
    manifest = _assemble(encoded, out, work, plan, about)
    tables = {name: described(out / name) for name in TABLES if (out / name).exists()}
    manifest |= {"recipe": recipe, "rejected": len(rejected), "tables": tables}
    write_atomically(out / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    shutil.rmtree(work)
    return Outcome({name: split["clips"] for name, split in manifest["splits"].items()}, len(rejected), seconds)


def _described(thing: Any) -> Any:
    """Return a source or plan as JSON values, with its type."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {each.name: _described(getattr(thing, each.name)) for each in dataclasses.fields(thing)}
        return {"type": type(thing).__name__} | fields
    if isinstance(thing, tuple):
        return [_described(each) for each in thing]
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


def _assemble(encoded: list[Encoded], out: Path, work: Path, plan: Plan, about: About) -> dict[str, Any]:
    """Shuffle, number and copy the encoded clips into tars; write the tables; return the manifest."""
    classes = about.classes or sorted({each.label for each in encoded})
    members = members_of(plan.encoding.codec, about.streams)
    sounds = frozenset({name for name, each in about.streams.items() if each.sense == "audio"} or {"audio"})
    splits: dict[str, Any] = {}
    index: list[dict[str, Any]] = []
    labels: list[pa.Table] = []
    events: list[pa.Table] = []
    annotated: list[str] = []
    for place, name in enumerate(sorted({each.split for each in encoded})):
        rng = np.random.default_rng([plan.seed, 3, place])
        clips = [each for each in encoded if each.split == name]
        clips = [clips[number] for number in rng.permutation(len(clips))]
        noisy = name == "train"
        true = np.array([0 if about.several else classes.index(each.label) for each in clips], dtype=np.int64)
        swapped = plan.correspondence_noise if noisy else 0.0
        pair = mismatch_pairs(len(clips), swapped, rng, true if plan.cross_class else None)
        samples = Samples(name, clips, pair, members, sounds, plan.encoding, work)
        shards = []
        for number, start in enumerate(range(0, len(clips), plan.shard_samples)):
            ids = range(start, min(start + plan.shard_samples, len(clips)))
            shard, rows = samples.write(out, number, ids)
            shards.append(shard)
            index += rows
        splits[name] = {"clips": len(clips), "shards": shards}
        flips = plan.label_noise if noisy else None
        given = flip_labels(true, len(classes), flips, rng) if flips else true
        names = np.array(classes, dtype=object)
        labels.append(_label_table(name, clips, names, given, true, pair, about.several))
        known = [about.events.get((name, each.source, each.label)) for each in clips]
        if clips and all(each is not None for each in known):
            annotated.append(name)
            told = np.stack([each for each in known if each is not None])
            told[:, 0] = told[pair, 0]
            keys = np.array([key_of(name, number) for number in range(len(clips))], dtype=object)
            sources = np.array([each.source for each in clips], dtype=object)
            events.append(events_table(name, keys, sources, classes, told))
        if noisy and (flips or plan.correspondence_noise):
            splits[name]["noise"] = {
                "label_rate": float((given != true).mean()),
                "correspondence_rate_nominal": float((pair != np.arange(len(pair))).mean()),
            }
            if not about.several:
                splits[name]["noise"]["correspondence_rate_semantic"] = float((true[pair] != true).mean())
    schema = index_schema(members)
    write_table(out / "index.parquet", pa.table({each: [row[each] for row in index] for each in schema.names}, schema))
    write_table(out / "labels.parquet", _with_truth(pa.concat_tables(labels), plan))
    manifest = {"format": 1, "classes": classes, "clip_s": plan.encoding.clip_s, "splits": splits}
    if about.streams:
        manifest["streams"] = {name: dataclasses.asdict(each) for name, each in about.streams.items()}
    else:
        rates = {"fps": plan.encoding.fps, "sample_rate_hz": plan.encoding.sample_rate_hz}
        manifest |= {"codec": plan.encoding.codec, **rates}
    if about.several:
        manifest["several_labels"] = True
    if events:
        write_table(out / EVENTS, pa.concat_tables(events))
        manifest["annotated"] = annotated
    return manifest


def _with_truth(table: pa.Table, plan: Plan) -> pa.Table:
    """Leave out the columns of truth where no noise was injected."""
    table = table if plan.label_noise else table.drop_columns(["true_label"])
    return table if plan.correspondence_noise else table.drop_columns(["pair_id"])


def _label_table(
    split: str,
    clips: list[Encoded],
    names: np.ndarray,
    given: np.ndarray,
    true: np.ndarray,
    pair: np.ndarray,
    several: bool,
) -> pa.Table:
    ids = range(len(clips))
    return pa.table(
        {
            "split": [split] * len(clips),
            "id": np.arange(len(clips)),
            "key": [key_of(split, number) for number in ids],
            "label": [each.label.split(",") for each in clips] if several else names[given],
            "true_label": names[true],
            "pair_id": pair,
        }
    )
