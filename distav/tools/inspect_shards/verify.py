"""Verification of a dataset: every file, member, index entry and label is compared with the manifest."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.console import show_progress
from distav.data.annotations.events import load_events
from distav.data.annotations.labels import load_labels
from distav.data.annotations.multi_labels import load_multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.reader import CorruptSampleError, ShardReader
from distav.data.storage.errors import ObjectNotFoundError, StorageError
from distav.data.storage.object_store import ObjectStore
from distav.data.storage.tar import dali_index, members_by_key

_MAX_JSON_BYTES = 1 << 20


def verify(root: str | Path, labels: str = "") -> Iterator[str]:
    """Yield the faults of a dataset, one line each with the file and the sample.

    Args:
        root: directory or URL of the dataset; remote shards are downloaded one at a time.
        labels: table of labels to check for use with the training split; empty for none.

    Raises:
        UserError: if the manifest is missing or damaged, so that nothing can be checked.
    """
    shards = ShardedDataset.open(root)
    listed: set[str] = set()
    for name, content in shards.manifest["splits"].items():
        listed |= {shard["name"] for shard in content["shards"]}
        try:
            split = shards.split(name)
            yield from _label_faults(shards, split, labels if name == "train" else "")
        except UserError as error:
            yield str(error)
            continue
        yield from _remote_faults(shards, split) if split.remote else _shard_faults(shards, split)
    names = (shards.remote.listing or ()) if shards.remote else (path.name for path in shards.root.glob("*.tar"))
    for name in sorted(names):
        if name.endswith(".tar") and name not in listed:
            yield f"{shards.location}/{name}: this shard is not listed in manifest.json"


def _label_faults(shards: ShardedDataset, split: Split, table: str) -> Iterator[str]:
    try:
        if split.name in shards.manifest.get("annotated_splits", ()):
            load_events(shards, split)
        if shards.multi_label:
            load_multi_labels(shards, split, table)
        else:
            load_labels(shards, split, table)
    except UserError as error:
        yield str(error)


def _remote_faults(shards: ShardedDataset, split: Split) -> Iterator[str]:
    """Check a remote split as a local one; its shards are downloaded one at a time."""
    with tempfile.TemporaryDirectory(prefix="distav-verify-") as folder:
        local = replace(split, remote=None, shards=[Path(folder, path.name) for path in split.shards])
        for fault in _shard_faults(shards, local, split.remote):
            yield fault.replace(folder, shards.location)


def _shard_faults(shards: ShardedDataset, split: Split, remote: ObjectStore | None = None) -> Iterator[str]:
    digests = [shard.get("sha256") for shard in shards.manifest["splits"][split.name]["shards"]]
    first_id = 0
    with show_progress(len(split), "clips", f"verifying {split.name}") as verifying:
        for number, path in enumerate(split.shards):
            ids = range(first_id, first_id + split.shard_sizes[number])
            first_id = ids.stop
            try:
                with _downloaded(remote, path), contextlib.closing(ShardReader(split)) as reader:
                    yield from _file_faults(split, reader, number, path, ids, digests[number])
            except StorageError as error:
                yield f"{path}: {error.reason}"
            verifying.advance(len(ids))


@contextlib.contextmanager
def _downloaded(remote: ObjectStore | None, shard: Path) -> Iterator[None]:
    """Context in which a remote shard and its index are stored locally; does nothing for local shards."""
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


def _file_faults(
    split: Split, reader: ShardReader, number: int, path: Path, ids: range, digest: str | None
) -> Iterator[str]:
    """Yield the faults of a shard's samples; its SHA-256 is compared only if there are none."""
    faults = 0
    for fault in _sample_faults(split, reader, number, path, ids):
        faults += 1
        yield fault
    with open(path, "rb") as file:
        if not faults and digest not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
            yield f"{path}: the SHA-256 differs from manifest.json; the file was altered"


def _sample_faults(split: Split, reader: ShardReader, number: int, path: Path, ids: range) -> Iterator[str]:
    try:
        members = members_by_key(path)
    except UserError as error:
        yield str(error)
        members = None
    if members is not None:
        keys = {str(split.keys[sample]) for sample in ids}
        for key in sorted(set(members) - keys):
            yield f"{path}: '{key}' is not in index.parquet"
        yield from _index_faults(path, members)
    for sample in ids:
        key = str(split.keys[sample])
        if int(split.columns["shard"][sample]) != number:
            yield f"index.parquet: '{key}' is listed in another shard than its id implies"
        elif members is not None:
            yield from _member_faults(split, path, sample, key, _by_extension(members.get(key, [])))
        try:
            reader.read(sample)
        except CorruptSampleError as reason:
            yield f"{path}: '{key}': {reason}"


def _by_extension(members: list[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Return offset and size in bytes of a sample's members by extension."""
    return {extension: (offset, size) for extension, offset, size in members}


def _member_faults(
    split: Split, path: Path, sample: int, key: str, members: dict[str, tuple[int, int]]
) -> Iterator[str]:
    columns = split.columns
    expected = split.members
    for name, extension in expected.items():
        indexed = int(columns[f"{name}_offset"][sample]), int(columns[f"{name}_bytes"][sample])
        actual = members.get(extension)
        if indexed == (0, 0) and actual is None and not split.streams:
            continue  # The sample lacks the modality.
        if actual != indexed:
            yield f"{path}: '{key}.{extension}': offset and bytes are {actual}, but {indexed} in index.parquet"
    if not split.streams:
        yield from _missing_member_faults(split, sample, key)
    for extension in sorted(set(members) - {*expected.values(), "json"}):
        yield f"{path}: '{key}.{extension}' is not a member of this dataset's samples"
    if "json" not in members:
        yield f"{path}: '{key}.json' is missing"
        return
    offset, size = members["json"]
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            sample_json(file.read(min(size, _MAX_JSON_BYTES + 1)))
        except UserError as error:
            yield f"{path}: '{key}.json': {error}"


def _missing_member_faults(split: Split, sample: int, key: str) -> Iterator[str]:
    """Compare the other columns of a sample with the members that it lacks according to its sizes."""
    row = {name: int(split.columns[name][sample]) for name in ("frames", "width", "height")}
    missing = [name for name in split.members if not split.columns[f"{name}_bytes"][sample]]
    if len(missing) == len(split.members):
        yield f"index.parquet: '{key}' has neither video nor audio"
    for name in missing:
        if checksum := int(split.columns[f"{name}_crc32"][sample]):
            yield f"index.parquet: '{key}' has no {name}, but {name}_crc32 is {checksum}; expected: 0"
    for column, value in row.items():
        if (value == 0) != ("video" in missing):
            state = "no video" if "video" in missing else "a video"
            yield f"index.parquet: '{key}' has {state}, but {column} is {value}"


def sample_json(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a sample.

    Raises:
        UserError: if the content is not a JSON object of at most 1 MiB.
    """
    try:
        value = json.loads(content) if len(content) <= _MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"not a JSON object of at most {_MAX_JSON_BYTES} bytes")
    return value


def _index_faults(path: Path, members: dict[str, list[tuple[str, int, int]]]) -> Iterator[str]:
    index = path.with_suffix(".idx")
    try:
        content = index.read_bytes()
    except OSError as error:
        yield f"{index}: {error.strerror}"
        return
    if content != dali_index(members):
        yield f"{index}: does not match {path.name}; create it again with DALI's wds2idx"
