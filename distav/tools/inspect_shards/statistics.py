"""Statistics of a dataset: counts and sizes from its tables, visual and audio measurements from decoded clips."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import format_list
from distav.console import format_table, printable, styled
from distav.data.annotations.labels import load_labels, multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.tools.inspect_shards.measurements import BLACK_FRACTION, BLACK_PIXEL, SILENT_DBFS, measure

PERCENTILES = (5, 25, 50, 75, 95)
MODALITY_COUNTS = ("video and audio", "video only", "audio only")
"""Keys of the numbers of clips by the modalities that they have."""
_LIST_WIDTH = 120
"""Width of lists of keys, in columns; keys are not divided."""


def compute_stats(root: str | Path, clips: int, seed: int, workers: int) -> dict[str, Any]:
    """Compute the statistics of a dataset, decoding some clips of each split.

    Args:
        root: the dataset.
        clips: number of uniformly selected clips per split to decode; 0 for all.
        seed: seed of the selection.
        workers: number of processes that decode.

    Returns:
        JSON object with the statistics of the dataset, and those of each split under `splits`.

    Raises:
        UserError: if the dataset cannot be opened.
    """
    shards = ShardedDataset.open(root)
    manifest = shards.manifest
    statistics = {name: manifest[name] for name in ("codec", "fps", "sample_rate_hz", "streams") if name in manifest}
    statistics |= {"root": str(root), "classes": len(shards.classes), "multi_label": shards.multi_label, "splits": {}}
    for name in manifest["splits"]:
        split = shards.split(name)
        ids = np.arange(len(split))
        if 0 < clips < len(split):
            ids = np.sort(np.random.default_rng(seed).choice(len(split), clips, replace=False))
        rows = measure(root, split, ids, workers)
        decoded = {"clips": len(rows), **_faults(split, rows), **_measurements(split, rows)}
        statistics["splits"][name] = {**_contents(shards, split), "decoded": decoded}
    return statistics


def _contents(shards: ShardedDataset, split: Split) -> dict[str, Any]:
    """Return counts and sizes from the tables of a split."""
    columns = split.columns
    clips_of_source = np.bincount(split.source_codes)
    durations = np.asarray(columns["duration_s"])
    member_sizes = {name: columns[f"{name}_bytes"] for name in split.members}
    contents = {
        "clips": len(split),
        "hours": float(durations.sum() / 3600),
        "clip_s": _counts(durations.tolist()),
        "sources": len(clips_of_source),
        "sources_by_clips": _counts(clips_of_source.tolist()),
        "classes": _classes(shards, split),
        **_list_lengths(shards, split),
        "tars": len(split.shards),
        "tar_bytes": sum(shard["bytes"] for shard in shards.manifest["splits"][split.name]["shards"]),
        "member_bytes": {name: distribution(sizes[sizes > 0]) for name, sizes in member_sizes.items()},
    }
    if not split.streams:
        visual, audio = split.has_modality("visual"), split.has_modality("audio")
        counts = (visual & audio).sum(), (visual & ~audio).sum(), (audio & ~visual).sum()
        contents["modalities"] = dict(zip(MODALITY_COUNTS, map(int, counts), strict=True))
        frame_sizes = zip(columns["width"][visual].tolist(), columns["height"][visual].tolist(), strict=True)
        contents["frame_sizes"] = _counts([f"{width}x{height}" for width, height in frame_sizes])
        contents["frames"] = _counts(columns["frames"][visual].tolist())
    return contents


def _counts(values: list[Any]) -> dict[str, int]:
    """Return the number of occurrences of each value, the most frequent first."""
    names, counts = np.unique(np.array(values), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[index]): int(counts[index]) for index in order}


def _classes(shards: ShardedDataset, split: Split) -> dict[str, dict[str, float]]:
    """Return number and fraction of the clips of each class, most frequent first; a clip counts for all its labels."""
    if shards.multi_label:
        given = [name for names in multi_labels(shards, split) for name in names]
    else:
        labels = load_labels(shards, split)
        given = [labels.classes[label] for label in labels.given]
    counts = dict.fromkeys(shards.classes, 0)
    for name in given:
        counts[name] = counts.get(name, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return {name: {"clips": count, "fraction": count / max(1, len(split))} for name, count in ordered}


def _list_lengths(shards: ShardedDataset, split: Split) -> dict[str, Any]:
    """Return `labels_per_clip`: mean, and number of clips by number of labels; empty for one label per clip."""
    if not shards.multi_label:
        return {}
    lengths = [len(names) for names in multi_labels(shards, split)]
    return {"labels_per_clip": {"mean": float(np.mean(lengths or [0])), "clips": _counts(lengths)}}


def distribution(values: Any) -> dict[str, float] | None:
    """Return mean, minimum, percentiles and maximum of some values; None if there are none."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    percentiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
    return {"mean": float(values.mean()), "min": float(values.min()), **percentiles, "max": float(values.max())}


def _faults(split: Split, rows: list[dict[str, Any]]) -> dict[str, Any]:
    damaged = {str(split.keys[row["id"]]): row["damaged"] for row in rows if "damaged" in row}
    undecodable = {str(split.keys[row["id"]]): row["undecodable"] for row in rows if "undecodable" in row}
    counts = {name: sum(name in members for members in damaged.values()) for name in split.members}
    return {"damaged_members": counts, "damaged": damaged, "undecodable": undecodable}


def _measurements(split: Split, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def keys_with(trait: str) -> list[str]:
        return [str(split.keys[row["id"]]) for row in rows if row.get(trait)]

    if split.streams:
        rms = {name: distribution([row["rms"][name] for row in rows if "rms" in row]) for name in split.streams}
        return {"rms": rms, "blank": keys_with("blank")}
    loudness = [row["loudness_lufs"] for row in rows if row.get("loudness_lufs") is not None]
    peaks = [row["peak_dbfs"] for row in rows if "peak_dbfs" in row]
    traits = {trait: keys_with(trait) for trait in ("silent", "black", "still")}
    return {
        "loudness_lufs": distribution(loudness),
        "without_loudness": len(peaks) - len(loudness),
        "peak_dbfs": distribution(peaks),
        **traits,
    }


def stats_json(statistics: dict[str, Any]) -> bytes:
    """Return the statistics as the content of a JSON file."""
    return (json.dumps(statistics, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def format_stats(statistics: dict[str, Any], limit: int) -> str:
    """Return the statistics as text, with at most `limit` rows per table and keys per list."""
    if "streams" in statistics:
        content = f"features {format_list(statistics['streams'])}"
    else:
        video = f"{statistics['codec']} at {statistics['fps']:g} frames/s"
        content = f"{video}, audio at {statistics['sample_rate_hz']} Hz"
    multi_label = ", several per clip" if statistics["multi_label"] else ""
    lines = [styled(f"{statistics['root']}: {content}; {statistics['classes']} classes{multi_label}", "bold")]
    for name, split in statistics["splits"].items():
        lines += ["", *_format_split(name, split, limit)]
    return "\n".join(lines)


def _format_split(name: str, split: dict[str, Any], limit: int) -> list[str]:
    size = f"{split['tar_bytes'] / 1e6:.1f} MB in {split['tars']} tar files"
    lengths = format_list((f"{float(seconds):g} s" for seconds in split["clip_s"]), 4)
    contents = f"{split['clips']} clips of {lengths} from {split['sources']} sources, {split['hours']:.2f} h, {size}"
    lines = [styled(f"{name}: {contents}", "bold")]
    classes = [(label, entry["clips"], 100 * entry["fraction"]) for label, entry in split["classes"].items()]
    lines += _format_rows(("class", "clips", "%"), classes, limit)
    if lists := split.get("labels_per_clip"):
        lines += ["", f"{lists['mean']:.2f} labels per clip"]
        lines += _format_rows(("labels per clip", "clips"), list(lists["clips"].items()), limit)
    clips_of_source = [(int(clips), sources) for clips, sources in split["sources_by_clips"].items()]
    lines += _format_rows(("clips per source", "sources"), clips_of_source, limit)
    modalities = split.get("modalities", {})
    if any(modalities.get(name) for name in MODALITY_COUNTS[1:]):
        lines += _format_rows(("modalities", "clips"), [row for row in modalities.items() if row[1]], limit)
    if split.get("frame_sizes"):
        lines += _format_rows(("frame size", "clips"), list(split["frame_sizes"].items()), limit)
    lines += ["", _format_distributions(split), *_format_measurements(split["decoded"], limit)]
    return lines


def _format_rows(head: tuple[str, ...], rows: list[tuple[Any, ...]], limit: int) -> list[str]:
    more = [f"... {len(rows) - limit} more"] if len(rows) > limit else []
    return ["", format_table(head, rows[:limit]), *more]


def _format_distributions(split: dict[str, Any]) -> str:
    decoded, names = split["decoded"], ("mean", "min", *(f"p{percent}" for percent in PERCENTILES), "max")
    quantities = {f"{member}, kB": (sizes, 1e-3) for member, sizes in split["member_bytes"].items()}
    quantities |= {f"{stream}, rms": (rms, 1.0) for stream, rms in decoded.get("rms", {}).items()}
    if "peak_dbfs" in decoded:
        quantities["loudness, LUFS"] = decoded["loudness_lufs"], 1.0
        quantities["peak, dBFS"] = decoded["peak_dbfs"], 1.0
    rows = [
        [quantity, *(values[name] * scale for name in names)]
        for quantity, (values, scale) in quantities.items()
        if values
    ]
    return format_table(("", *names), rows)


def _format_measurements(decoded: dict[str, Any], limit: int) -> list[str]:
    descriptions = {
        "silent": f"silent, peak below {SILENT_DBFS:g} dBFS",
        "black": f"black, {100 * BLACK_FRACTION:g} % of every frame below {100 * BLACK_PIXEL:g} % brightness",
        "still": "still, no change between frames",
        "blank": "blank, a stream with one constant value",
        "undecodable": "not decodable",
        "damaged": "damaged, CRC-32 or size differs",
    }
    lines = ["", f"{decoded['clips']} clips decoded:"]
    if decoded.get("without_loudness"):
        lines.append(f"  {decoded['without_loudness']} too short or too quiet to measure loudness")
    for name, description in descriptions.items():
        if name in decoded:
            keys = f": {format_list(decoded[name], limit)}" if decoded[name] else ""
            line = printable(f"{len(decoded[name])} {description}{keys}")
            lines += textwrap.wrap(
                line, _LIST_WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
    for key, reasons in [*decoded["damaged"].items(), *decoded["undecodable"].items()][:limit]:
        reason = "; ".join(reasons.values()) if isinstance(reasons, dict) else reasons
        lines.append(printable(f"  {key}: {reason}"))
    return lines
