"""The manifest of a dataset: reading and validation.

`manifest.json` is a JSON object:

| key | value |
|---|---|
| `format` | `FORMAT` |
| `classes` | class names, in the order of their indices |
| `splits` | per split: `clips`, `shards` (`name`, `bytes`, `clips`, `sha256` of each) and injected `noise`, if any |
| `codec`, `fps`, `sample_rate_hz` | encoding of the clips; absent from a dataset of features |
| `streams` | `modality`, `steps` and `dim` of each feature stream; absent from a dataset of clips |
| `multi_label` | true if a sample may have any number of classes |
| `annotated_splits` | splits whose events are in events.parquet |
| `tables` | `bytes` and `sha256` of each Parquet table |
| `recipe`, `rejected`, `num_relabeled` | how the dataset was made, numbers of rejected and of relabeled clips |
| `review` | agreement and conflicts of several reviewers, in a cleaned dataset |
"""

import json
import re
from typing import Any

from distav.config.errors import UserError, format_list
from distav.data.modalities import MODALITIES, STREAM_NAME

FORMAT = 2
"""Version of the dataset format. Format 1 had other names for columns and manifest keys."""
VIDEO_EXTENSIONS = {"mjpeg": "avi", "vp9": "webm", "h264": "mp4"}


def read_manifest(content: bytes, location: str) -> dict[str, Any]:
    """Return the content of a manifest after validating it.

    Args:
        content: bytes of the file.
        location: its path or URL.

    Raises:
        UserError: if it is not a valid manifest of a dataset, or of another format.
    """
    try:
        manifest = json.loads(content)
        error = _content_error(manifest)
    except (ValueError, RecursionError) as json_error:
        error = str(json_error)
    if error:
        raise UserError(
            f"{location} is not a valid manifest ({error}); copy the dataset again, or make it again with "
            "tools/make_shards.py."
        )
    return manifest


def _content_error(manifest: Any) -> str:
    """Return what is wrong with a manifest, or an empty string."""
    if not isinstance(manifest, dict):
        return "not a JSON object"
    if manifest.get("format") != FORMAT:
        return f"dataset format {manifest.get('format')}; this version of distav reads format {FORMAT}"
    types: dict[str, Any] = {"splits": dict, "classes": list}
    encoding = {"codec": str, "fps": int | float, "sample_rate_hz": int}
    for key, expected in (types | ({"streams": dict} if "streams" in manifest else encoding)).items():
        if not isinstance(manifest.get(key), expected):
            return f"'{key}' is missing or has the wrong type"
    classes = manifest["classes"]
    if not classes or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        return "'classes' must be a list of distinct names"
    if not isinstance(manifest.get("multi_label", False), bool):
        return "'multi_label' must be true or false"
    if error := _streams_error(manifest["streams"]) if "streams" in manifest else _encoding_error(manifest):
        return error
    tables = manifest.get("tables", {})
    if not isinstance(tables, dict) or not all(isinstance(entry, dict) for entry in tables.values()):
        return "'tables' has the wrong type"
    for name, split in manifest["splits"].items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list) or not all(map(_is_shard, shards)):
            return f"split '{name}': 'shards' must be a list of shards with plain names and sizes"
    return ""


def _encoding_error(manifest: dict[str, Any]) -> str:
    if manifest["codec"] not in VIDEO_EXTENSIONS:
        return f"codec '{manifest['codec']}'; allowed: {format_list(VIDEO_EXTENSIONS)}"
    if not 0 < manifest["fps"] < 1e4 or not 0 < manifest["sample_rate_hz"] < 1e6:
        return f"fps {manifest['fps']} or sample_rate_hz {manifest['sample_rate_hz']} is out of range"
    return ""


def _streams_error(streams: dict[str, Any]) -> str:
    for name, stream in streams.items():
        sizes = [stream.get("steps"), stream.get("dim")] if isinstance(stream, dict) else []
        if not STREAM_NAME.fullmatch(name) or not all(isinstance(size, int) and size > 0 for size in sizes):
            return f"stream '{name}' must have a plain name, and positive 'steps' and 'dim'"
        if set(stream) != {"modality", "steps", "dim"} or stream["modality"] not in MODALITIES:
            return f"stream '{name}' has no valid modality; allowed: {format_list(MODALITIES)}"
    if {stream["modality"] for stream in streams.values()} != set(MODALITIES):
        return "'streams' must contain both modalities"
    return ""


def _is_shard(shard: Any) -> bool:
    name, size = (shard.get("name"), shard.get("bytes")) if isinstance(shard, dict) else (None, None)
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-]+\.tar", name)) and isinstance(size, int)
