"""The manifest of a set: what a sound one says."""

import json
import re
from typing import Any

from distav.config.errors import UserError, format_list
from distav.data.modalities import MODALITIES, STREAM_NAME

VIDEO_EXTENSIONS = {"mjpeg": "avi", "vp9": "webm", "h264": "mp4"}


def read_manifest(content: bytes, where: str) -> dict[str, Any]:
    """Return what a manifest says; nothing of it is used before it is known to be sound.

    Args:
        content: the file.
        where: its path or URL.

    Raises:
        UserError: where it is no manifest of a set.
    """
    try:
        manifest = json.loads(content)
        fault = _fault(manifest)
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise UserError(f"{where} is damaged ({fault}); make the shards again.")
    return manifest


def _fault(manifest: Any) -> str:
    """Return what is wrong with a manifest."""
    if not isinstance(manifest, dict):
        return "no JSON object"
    kinds: dict[str, Any] = {"splits": dict, "classes": list}
    clips = {"codec": str, "fps": int | float, "sample_rate_hz": int}
    for key, kind in (kinds | ({"streams": dict} if "streams" in manifest else clips)).items():
        if not isinstance(manifest.get(key), kind):
            return f"'{key}' is missing or of another kind"
    classes = manifest["classes"]
    if not classes or not all(isinstance(each, str) for each in classes) or len(set(classes)) < len(classes):
        return "'classes' is no list of different names"
    if not isinstance(manifest.get("multi_label", False), bool):
        return "'multi_label' is neither true nor false"
    if fault := _streams_fault(manifest["streams"]) if "streams" in manifest else _clips_fault(manifest):
        return fault
    tables = manifest.get("tables", {})
    if not isinstance(tables, dict) or not all(isinstance(each, dict) for each in tables.values()):
        return "'tables' is of another kind"
    for name, split in manifest["splits"].items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list) or not all(map(_is_shard, shards)):
            return f"split '{name}' has no list of shards with plain names and sizes"
    return ""


def _clips_fault(manifest: dict[str, Any]) -> str:
    if manifest["codec"] not in VIDEO_EXTENSIONS:
        return f"codec '{manifest['codec']}'; allowed: {format_list(VIDEO_EXTENSIONS)}"
    if not 0 < manifest["fps"] < 1e4 or not 0 < manifest["sample_rate_hz"] < 1e6:
        return "a rate that no clip has"
    return ""


def _streams_fault(streams: dict[str, Any]) -> str:
    for name, each in streams.items():
        sizes = [each.get("steps"), each.get("dim")] if isinstance(each, dict) else []
        if not STREAM_NAME.fullmatch(name) or not all(isinstance(size, int) and size > 0 for size in sizes):
            return f"stream '{name}' has no plain name, or no steps and dim"
        if set(each) != {"modality", "steps", "dim"} or each["modality"] not in MODALITIES:
            return f"stream '{name}' is of no modality; allowed: {format_list(MODALITIES)}"
    return "" if {each["modality"] for each in streams.values()} == set(MODALITIES) else "no streams of both modalities"


def _is_shard(each: Any) -> bool:
    name, size = (each.get("name"), each.get("bytes")) if isinstance(each, dict) else (None, None)
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-]+\.tar", name)) and isinstance(size, int)
