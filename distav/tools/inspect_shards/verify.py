"""Whether a set is what was written: every file, member, index entry and label, checked before a run relies on it."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.data.annotations.events import load_events
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.reader import CorruptSampleError, ShardReader
from distav.data.storage.errors import ObjectNotFoundError, StorageError
from distav.data.storage.object_store import ObjectStore
from distav.data.storage.tar import members_by_key, dali_index

_MOST_JSON = 1 << 20


def verify(root: str | Path, labels: str = "") -> Iterator[str]:
    """Yield what is wrong with a set, a line each, which names the file and the sample.

    Args:
        root: the folder, or the URL: shards are then copied here one by one.
        labels: a table of labels to be used with it; empty for none.

    Raises:
        UserError: where nothing can be checked, as the manifest is missing or damaged.
    """
    shards = ShardedDataset.open(root)
    named: set[str] = set()
    for name, content in shards.manifest["splits"].items():
        named |= {each["name"] for each in content["shards"]}
        try:
            split = shards.split(name)
            yield from _labels(shards, split, labels if name == "train" else "")
        except UserError as error:
            yield str(error)
            continue
        yield from _copied(shards, split) if split.remote else _content(shards, split)
    there = (shards.remote.listing or ()) if shards.remote else (path.name for path in shards.root.glob("*.tar"))
    for name in sorted(there):
        if name.endswith(".tar") and name not in named:
            yield f"{shards.location}/{name}: manifest.json does not name this shard"


def _labels(shards: ShardedDataset, split: Split, table: str) -> Iterator[str]:
    try:
        if shards.multi_label or split.name in shards.manifest.get("annotated_splits", ()):
            load_events(shards, split)
        if not shards.multi_label:
            load_labels(shards, split, table)
    except UserError as error:
        yield str(error)


def _copied(shards: ShardedDataset, split: Split) -> Iterator[str]:
    """Check a remote split as a local one, of which one shard is here at a time."""
    with tempfile.TemporaryDirectory(prefix="distav-verify-") as folder:
        here = replace(split, remote=None, shards=[Path(folder, path.name) for path in split.shards])
        for fault in _content(shards, here, split.remote):
            yield fault.replace(folder, shards.location)


def _content(shards: ShardedDataset, split: Split, remote: ObjectStore | None = None) -> Iterator[str]:
    digests = [each.get("sha256") for each in shards.manifest["splits"][split.name]["shards"]]
    first = 0
    for number, path in enumerate(split.shards):
        ids = range(first, first + split.shard_sizes[number])
        first = ids.stop
        try:
            with _fetched(remote, path), contextlib.closing(ShardReader(split)) as reader:
                yield from _whole(split, reader, number, path, ids, digests[number])
        except StorageError as fault:
            yield f"{path}: {fault.reason}"


@contextlib.contextmanager
def _fetched(remote: ObjectStore | None, shard: Path) -> Iterator[None]:
    """Have a remote shard and its index here for a while."""
    index = shard.with_suffix(".idx")
    try:
        if remote:
            remote.download(shard.name, shard)
            with contextlib.suppress(ObjectNotFoundError):
                remote.download(index.name, index)
        yield
    finally:
        for path in (shard, index) if remote else ():
            path.unlink(missing_ok=True)


def _whole(split: Split, reader: ShardReader, number: int, path: Path, ids: range, digest: str | None) -> Iterator[str]:
    faults = 0
    for fault in _shard(split, reader, number, path, ids):
        faults += 1
        yield fault
    with open(path, "rb") as file:
        if not faults and digest not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
            yield f"{path} was altered, its SHA-256 is not that of manifest.json"


def _shard(split: Split, reader: ShardReader, number: int, path: Path, ids: range) -> Iterator[str]:
    try:
        there = members_by_key(path)
    except UserError as error:
        yield str(error)
        there = None
    if there is not None:
        keys = {str(split.keys[sample]) for sample in ids}
        for key in sorted(set(there) - keys):
            yield f"{path}: '{key}' is not in index.parquet"
        yield from _dali_index(path, there)
    for sample in ids:
        key = str(split.keys[sample])
        if int(split.columns["shard"][sample]) != number:
            yield f"index.parquet: '{key}' is not in the shard where its id would have it"
        elif there is not None:
            yield from _members(split, path, sample, key, _by_extension(there.get(key, [])))
        try:
            reader.read(sample)
        except CorruptSampleError as reason:
            yield f"{path}: '{key}': {reason}"


def _by_extension(parts: list[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Return offset and bytes of the members of a sample by extension."""
    return {extension: (offset, size) for extension, offset, size in parts}


def _members(split: Split, path: Path, sample: int, key: str, there: dict[str, tuple[int, int]]) -> Iterator[str]:
    columns = split.columns
    expected = split.members
    for kind, extension in expected.items():
        said = int(columns[f"{kind}_offset"][sample]), int(columns[f"{kind}_bytes"][sample])
        if there.get(extension) != said:
            yield f"{path}: '{key}.{extension}': offset and bytes {said} in index.parquet, {there.get(extension)} here"
    for extension in sorted(set(there) - {*expected.values(), "json"}):
        yield f"{path}: '{key}.{extension}' does not belong to a sample of this set"
    if "json" not in there:
        yield f"{path}: '{key}.json' is missing"
        return
    offset, size = there["json"]
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            sample_json(file.read(min(size, _MOST_JSON + 1)))
        except UserError as error:
            yield f"{path}: '{key}.json': {error}"


def sample_json(content: bytes) -> dict[str, Any]:
    """Return what a sample's JSON says.

    Raises:
        UserError: where it is no JSON object of at most 1 MiB.
    """
    try:
        found = json.loads(content) if len(content) <= _MOST_JSON else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"no JSON object of at most {_MOST_JSON} bytes")
    return found


def _dali_index(path: Path, there: dict[str, list[tuple[str, int, int]]]) -> Iterator[str]:
    index = path.with_suffix(".idx")
    try:
        said = index.read_bytes()
    except OSError as error:
        yield f"{index}: {error.strerror}"
        return
    if said != dali_index(there):
        yield f"{index} does not describe {path.name}; write it anew with DALI's wds2idx"
