"""A contact sheet: some clips of a split in one picture, each with frames, sound, key and label."""

from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.annotations.labels import load_labels, multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, ShardReader
from distav.tools.inspect_shards.drawing import Cell, draw
from distav.tools.inspect_shards.measurements import measure_clip
from distav.tools.inspect_shards.text_table import WIDTH, cut, table

FRAMES = 4
MOST_CLIPS = 400
"""More make a picture that hardly any program opens."""
_MOST_CELL = 28


def show(
    root: str | Path, name: str, clips: int, seed: int, frames: int, kind: str, keys: list[str], out: Path
) -> bool:
    """Draw a contact sheet of some clips of a split, and print them as a table.

    Args:
        root: the set.
        name: of the split.
        clips: how many are drawn by chance, where no keys are given.
        seed: of that chance.
        frames: shown of each clip, at even distances.
        kind: a class, whose clips alone are shown; empty for all.
        keys: of the clips to show; empty for some by chance.
        out: the picture to write.

    Returns:
        Whether all of them could be read and decoded.

    Raises:
        UserError: for a set of features, or a split, class or key that it does not have.
    """
    shards = ShardedDataset.open(root)
    if shards.streams:
        raise UserError(
            f"{root} holds features, {format_list(shards.streams)}: nothing to see or hear; `stats` counts them."
        )
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={out}: has to end in .png.")
    split = shards.split(name, "--split")
    labels = _labels(shards, split)
    chosen = _by_keys(split, keys) if keys else _by_chance(shards, split, labels, kind, clips, seed)
    if len(chosen) > MOST_CLIPS:
        raise UserError(f"{len(chosen)} clips are too many for one picture; allowed: up to {MOST_CLIPS}.")
    reader = ShardReader(split)
    cells = [_cell(reader, sample, labels[sample]) for sample in chosen]
    reader.close()
    draw(cells, frames).save(out)
    rows = [_row(split, *each) for each in zip(chosen, cells, strict=True)]
    print(table(("key", "label", "source", "start, s", "size", "note"), rows, _MOST_CELL))
    faults = [cell for cell in cells if cell.frames is None]
    for cell in faults:
        print(cut(f"{cell.key}: {cell.note}", WIDTH))
    print(f"{out}: {len(cells)} of {len(split)} clips of {name}")
    return not faults


def _labels(shards: ShardedDataset, split: Split) -> list[list[str]]:
    if shards.multi_label:
        return multi_labels(shards, split)
    labels = load_labels(shards, split)
    return [[labels.classes[number]] for number in labels.given]


def _by_keys(split: Split, keys: list[str]) -> list[int]:
    place = {key: number for number, key in enumerate(split.keys.tolist())}
    unknown = [key for key in keys if key not in place]
    if unknown:
        raise UserError(
            f"--keys {unknown[0]}: not in split {split.name} of {split.root}, which has {format_list(split.keys, 3)}; "
            "give another --split or key."
        )
    return [place[key] for key in keys]


def _by_chance(
    shards: ShardedDataset, split: Split, labels: list[list[str]], kind: str, clips: int, seed: int
) -> list[int]:
    if kind and kind not in shards.classes:
        raise UserError(f"--class={kind}: allowed: {format_list(shards.classes)}.{did_you_mean(kind, shards.classes)}")
    among = [number for number, names in enumerate(labels) if not kind or kind in names]
    if not among:
        raise UserError(f"--class={kind}: no clip of {split.name} has this label; give another --class or --split.")
    drawn = np.random.default_rng(seed).choice(among, min(clips, len(among)), replace=False)
    return np.sort(drawn).tolist()


def _cell(reader: ShardReader, sample: int, names: list[str]) -> Cell:
    split = reader.split
    key, label = str(split.keys[sample]), ", ".join(names)
    try:
        frames, sound = decode_clip(reader.read(sample))
    except (CorruptSampleError, DecodeError) as reason:
        return Cell(key, label, str(reason))
    seen = measure_clip(frames, sound, split.sample_rate_hz)
    traits = [trait for trait in ("silent", "black", "still") if seen[trait]]
    return Cell(key, label, ", ".join([f"peak {seen['peak_dbfs']:.0f} dBFS", *traits]), frames, sound)


def _row(split: Split, sample: int, cell: Cell) -> tuple[Any, ...]:
    columns = split.columns
    size = f"{columns['frames'][sample]}x{columns['width'][sample]}x{columns['height'][sample]}"
    return cell.key, cell.label, columns["source"][sample], float(columns["start_s"][sample]), size, cell.note
