"""What a set holds, in figures: counts and sizes by its tables, looks and loudness by decoding some of its clips."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import format_list
from distav.data.annotations.labels import load_labels, multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.tools.inspect_shards.measurements import BLACK_PIXEL, BLACK_SHARE, SILENT_DBFS, measure
from distav.tools.inspect_shards.text_table import WIDTH, cut, printable, table

PERCENTILES = (5, 25, 50, 75, 95)


def stats(root: str | Path, clips: int, seed: int, workers: int) -> dict[str, Any]:
    """Count what a set holds, and decode some clips of each split.

    Args:
        root: the set.
        clips: of each split that are decoded, drawn evenly; 0 for all.
        seed: by which they are drawn.
        workers: processes that decode.

    Returns:
        Figures of JSON values: of the set, and of each split under `splits`.

    Raises:
        UserError: where the set cannot be opened.
    """
    shards = ShardedDataset.open(root)
    manifest = shards.manifest
    found = {name: manifest[name] for name in ("codec", "fps", "sample_rate_hz", "streams") if name in manifest}
    found |= {"root": str(root), "classes": len(shards.classes), "multi_label": shards.multi_label, "splits": {}}
    for name in manifest["splits"]:
        split = shards.split(name)
        chosen = np.arange(len(split))
        if 0 < clips < len(split):
            chosen = np.sort(np.random.default_rng(seed).choice(len(split), clips, replace=False))
        rows = measure(root, split, chosen, workers)
        decoded = {"clips": len(rows), **_faults(split, rows), **_looks(split, rows)}
        found["splits"][name] = {**_contents(shards, split), "decoded": decoded}
    return found


def _contents(shards: ShardedDataset, split: Split) -> dict[str, Any]:
    """Count what the tables say of a split."""
    columns = split.columns
    of_sources = np.bincount(split.source_codes)
    durations = np.asarray(columns["duration_s"])
    found = {
        "clips": len(split),
        "hours": float(durations.sum() / 3600),
        "clip_s": _counted(durations.tolist()),
        "sources": len(of_sources),
        "sources_by_clips": _counted(of_sources.tolist()),
        "classes": _classes(shards, split),
        "tars": len(split.shards),
        "tar_bytes": sum(each["bytes"] for each in shards.manifest["splits"][split.name]["shards"]),
        "member_bytes": {name: spread(columns[f"{name}_bytes"]) for name in split.members},
    }
    if not split.streams:
        sizes = zip(columns["width"].tolist(), columns["height"].tolist(), strict=True)
        found["frame_sizes"] = _counted([f"{width}x{height}" for width, height in sizes])
        found["frames"] = _counted(columns["frames"].tolist())
    return found


def _counted(values: list[Any]) -> dict[str, int]:
    """Return how often each value occurs, the most frequent first."""
    names, counts = np.unique(np.array(values), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[place]): int(counts[place]) for place in order}


def _classes(shards: ShardedDataset, split: Split) -> dict[str, dict[str, float]]:
    """Return clips of each class and their share, the most frequent first; a clip counts in each of its own."""
    if shards.multi_label:
        given = [name for names in multi_labels(shards, split) for name in names]
    else:
        labels = load_labels(shards, split)
        given = [labels.classes[number] for number in labels.given]
    counts = dict.fromkeys(shards.classes, 0)
    for name in given:
        counts[name] = counts.get(name, 0) + 1
    in_order = sorted(counts.items(), key=lambda each: -each[1])
    return {name: {"clips": count, "share": count / max(1, len(split))} for name, count in in_order}


def spread(values: Any) -> dict[str, float] | None:
    """Return mean, smallest, percentiles and largest of some values; None of none."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    shares = {f"p{each}": float(np.percentile(values, each)) for each in PERCENTILES}
    return {"mean": float(values.mean()), "min": float(values.min()), **shares, "max": float(values.max())}


def _faults(split: Split, rows: list[dict[str, Any]]) -> dict[str, Any]:
    damaged = {str(split.keys[row["id"]]): row["damaged"] for row in rows if "damaged" in row}
    undecodable = {str(split.keys[row["id"]]): row["undecodable"] for row in rows if "undecodable" in row}
    count = {name: sum(name in each for each in damaged.values()) for name in split.members}
    return {"damaged_members": count, "damaged": damaged, "undecodable": undecodable}


def _looks(split: Split, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def keys(trait: str) -> list[str]:
        return [str(split.keys[row["id"]]) for row in rows if row.get(trait)]

    if split.streams:
        rms = {name: spread([row["rms"][name] for row in rows if "rms" in row]) for name in split.streams}
        return {"rms": rms, "blank": keys("blank")}
    loud = [row["loudness_lufs"] for row in rows if row.get("loudness_lufs") is not None]
    peaks = [row["peak_dbfs"] for row in rows if "peak_dbfs" in row]
    traits = {trait: keys(trait) for trait in ("silent", "black", "still")}
    return {
        "loudness_lufs": spread(loud),
        "without_loudness": len(peaks) - len(loud),
        "peak_dbfs": spread(peaks),
        **traits,
    }


def stats_json(found: dict[str, Any]) -> bytes:
    """Return the figures as the content of a JSON file."""
    return (json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def told(found: dict[str, Any], most: int) -> str:
    """Return the figures as text, with so many rows of a table and keys of a list."""
    kind = (
        f"features {format_list(found['streams'])}"
        if "streams" in found
        else (f"{found['codec']} at {found['fps']:g} frames/s, sound at {found['sample_rate_hz']} Hz")
    )
    several = ", several a clip" if found["multi_label"] else ""
    parts = [printable(f"{found['root']}: {kind}; {found['classes']} classes{several}")]
    for name, split in found["splits"].items():
        parts += ["", *_told_split(name, split, most)]
    return "\n".join(parts)


def _told_split(name: str, split: dict[str, Any], most: int) -> list[str]:
    size = f"{split['tar_bytes'] / 1e6:.1f} MB in {split['tars']} tars"
    lengths = format_list((f"{float(each):g} s" for each in split["clip_s"]), 4)
    lines = [
        f"{name}: {split['clips']} clips of {lengths} from {split['sources']} sources, {split['hours']:.2f} h, {size}"
    ]
    classes = [(kind, each["clips"], 100 * each["share"]) for kind, each in split["classes"].items()]
    lines += _first(("class", "clips", "%"), classes, most)
    counted = [(int(clips), sources) for clips, sources in split["sources_by_clips"].items()]
    lines += _first(("clips of a source", "sources"), counted, most)
    if "frame_sizes" in split:
        lines += _first(("frame size", "clips"), list(split["frame_sizes"].items()), most)
    lines += ["", _spreads(split), *_told_looks(split["decoded"], most)]
    return lines


def _first(head: tuple[str, ...], rows: list[tuple[Any, ...]], most: int) -> list[str]:
    more = [f"... {len(rows) - most} more"] if len(rows) > most else []
    return ["", table(head, rows[:most]), *more]


def _spreads(split: dict[str, Any]) -> str:
    decoded, names = split["decoded"], ("mean", "min", *(f"p{each}" for each in PERCENTILES), "max")
    every = {f"{member}, kB": (each, 1e-3) for member, each in split["member_bytes"].items()}
    every |= {f"{stream}, rms": (each, 1.0) for stream, each in decoded.get("rms", {}).items()}
    if "peak_dbfs" in decoded:
        every |= {"loudness, LUFS": (decoded["loudness_lufs"], 1.0), "peak, dBFS": (decoded["peak_dbfs"], 1.0)}
    rows = [[what, *(each[name] * scale for name in names)] for what, (each, scale) in every.items() if each]
    return table(("", *names), rows)


def _told_looks(decoded: dict[str, Any], most: int) -> list[str]:
    about = {
        "silent": f"silent, peak below {SILENT_DBFS:g} dBFS",
        "black": f"black, {100 * BLACK_SHARE:g} % of every frame below {100 * BLACK_PIXEL:g} % brightness",
        "still": "still, no change between frames",
        "blank": "blank, one value throughout a stream",
        "undecodable": "not decodable",
        "damaged": "damaged, CRC-32 or size differs",
    }
    lines = ["", f"of {decoded['clips']} clips decoded:"]
    if decoded.get("without_loudness"):
        lines.append(f"  {decoded['without_loudness']} too short or too quiet for a loudness")
    for name, what in about.items():
        if name in decoded:
            keys = f": {format_list(decoded[name], most)}" if decoded[name] else ""
            line = printable(f"{len(decoded[name])} {what}{keys}")
            lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    for key, reasons in [*decoded["damaged"].items(), *decoded["undecodable"].items()][:most]:
        why = "; ".join(reasons.values()) if isinstance(reasons, dict) else reasons
        lines.append(cut(f"  {key}: {why}", WIDTH))
    return lines
