"""A contact sheet: one image with frames, audio, key and label of some clips of a split."""

from pathlib import Path

import numpy as np

from distav.config.errors import UserError, did_you_mean, format_list
from distav.console import Cell as TableCell
from distav.console import Styled, format_table
from distav.data.annotations.labels import load_labels, multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, ShardReader
from distav.tools.inspect_shards.drawing import Cell, draw
from distav.tools.inspect_shards.measurements import measure_clip

DEFAULT_FRAMES = 4
MAX_CLIPS = 400
"""Limit of the clips on a sheet; few programs open larger images."""


def preview(
    root: str | Path, split_name: str, clips: int, seed: int, frames: int, label: str, keys: list[str], out: Path
) -> bool:
    """Draw a contact sheet of some clips of a split, and print them as a table.

    Args:
        root: the dataset.
        split_name: name of the split.
        clips: number of randomly selected clips, if no keys are specified.
        seed: seed of the selection.
        frames: number of evenly spaced frames per clip.
        label: class from which clips are selected; empty for all.
        keys: keys of the clips to show; empty for a random selection.
        out: PNG file to write.

    Returns:
        Whether all clips could be read and decoded.

    Raises:
        UserError: for a dataset of features, and for a split, class or key that the dataset does not have.
    """
    shards = ShardedDataset.open(root)
    if shards.streams:
        raise UserError(
            f"{root}: a dataset of features ({format_list(shards.streams)}) has no frames or audio to preview; "
            "use `stats` instead."
        )
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={out}: the file name must end in .png.")
    split = shards.split(split_name, "--split")
    labels = _labels(shards, split)
    samples = _samples_of(split, keys) if keys else _random_samples(shards, split, labels, label, clips, seed)
    if len(samples) > MAX_CLIPS:
        raise UserError(f"{len(samples)} clips are too many for one image; allowed: at most {MAX_CLIPS}.")
    reader = ShardReader(split)
    cells = [_cell(reader, sample, labels[sample]) for sample in samples]
    reader.close()
    draw(cells, frames).save(out)
    rows = [_row(split, sample, cell) for sample, cell in zip(samples, cells, strict=True)]
    print(format_table(("key", "label", "source", "start, s", "size", "note"), rows))
    print(f"{out}: {len(cells)} of {len(split)} clips of {split_name}")
    return not any(cell.is_fault for cell in cells)


def _labels(shards: ShardedDataset, split: Split) -> list[list[str]]:
    """Return the class names of each clip."""
    if shards.multi_label:
        return multi_labels(shards, split)
    labels = load_labels(shards, split)
    return [[labels.classes[label]] for label in labels.given]


def _samples_of(split: Split, keys: list[str]) -> list[int]:
    sample_of = {key: sample for sample, key in enumerate(split.keys.tolist())}
    unknown = [key for key in keys if key not in sample_of]
    if unknown:
        raise UserError(
            f"--keys {unknown[0]}: not in split {split.name} of {split.root}, which has {format_list(split.keys, 3)}; "
            "specify another --split or key."
        )
    return [sample_of[key] for key in keys]


def _random_samples(
    shards: ShardedDataset, split: Split, labels: list[list[str]], label: str, clips: int, seed: int
) -> list[int]:
    """Return the sorted ids of randomly selected clips, of one class if `label` is not empty."""
    if label and label not in shards.classes:
        raise UserError(
            f"--class={label}: allowed: {format_list(shards.classes)}.{did_you_mean(label, shards.classes)}"
        )
    candidates = [sample for sample, names in enumerate(labels) if not label or label in names]
    if not candidates:
        raise UserError(f"--class={label}: no clip of {split.name} has this label; specify another --class or --split.")
    selected = np.random.default_rng(seed).choice(candidates, min(clips, len(candidates)), replace=False)
    return np.sort(selected).tolist()


def _cell(reader: ShardReader, sample: int, names: list[str]) -> Cell:
    split = reader.split
    key, label = str(split.keys[sample]), ", ".join(names)
    try:
        frames, audio = decode_clip(reader.read(sample))
    except (CorruptSampleError, DecodeError) as reason:
        return Cell(key, label, str(reason))
    measured = measure_clip(frames, audio, split.sample_rate_hz)
    notes = ["no audio" if audio is None else f"peak {measured['peak_dbfs']:.0f} dBFS"]
    if frames is None:
        notes.append("no video")
    notes += [trait for trait in ("silent", "black", "still") if measured.get(trait)]
    return Cell(key, label, ", ".join(notes), frames, audio)


def _row(split: Split, sample: int, cell: Cell) -> tuple[TableCell, ...]:
    columns = split.columns
    size = f"{columns['frames'][sample]}x{columns['width'][sample]}x{columns['height'][sample]}"
    size = size if columns["frames"][sample] else "no video"
    note = Styled(cell.note, "red") if cell.is_fault else cell.note
    return cell.key, cell.label, split.sources[sample], float(columns["start_s"][sample]), size, note
