"""Manifests of size and SHA-256: detect files that have been modified, truncated or removed since they were written.

The digests detect accidental damage, not tampering: whoever can write the directory can also write its manifest.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 << 20
"""Largest manifest that is read."""


class CorruptFileError(Exception):
    """A file differs from what was written; the message gives the reason."""


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_entry(path: Path) -> dict[str, Any]:
    """Flush a file to disk and return its size and SHA-256, an entry of a manifest."""
    sync(path)
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a directory, after all of its other files.

    Args:
        folder: the directory.
        files: the `file_entry` of each file by name.
    """
    path = folder / MANIFEST
    path.write_bytes(_serialize({"format": 1, "files": files}))
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of the files that a directory must contain, by name.

    Raises:
        CorruptFileError: if the manifest is missing or corrupt.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CorruptFileError(f"{MANIFEST} is larger than {_MAX_MANIFEST_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise CorruptFileError(f"{MANIFEST}: {error.strerror}") from None
    return parse_manifest(content)


def parse_manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """Return the entries of a manifest by file name.

    Raises:
        CorruptFileError: if the bytes are not a valid manifest.
    """
    try:
        manifest = json.loads(content)
        fields = {key: manifest[key] for key in manifest if key != "sha256"} if isinstance(manifest, dict) else None
        valid = fields is not None and _serialize(fields) == content
    except (ValueError, RecursionError):
        valid, manifest = False, {}
    if not valid:
        raise CorruptFileError(f"{MANIFEST} is corrupt: its SHA-256 does not match its content")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        _is_plain_name(name) and isinstance(entry, dict) for name, entry in files.items()
    ):
        raise CorruptFileError(f"{MANIFEST}: 'files' must map plain file names to entries")
    return files


def verify_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Compare a file with its entry in the manifest.

    Raises:
        CorruptFileError: if the file is missing, or if its size or SHA-256 differs.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise CorruptFileError(f"{name} has {size} bytes, expected {expected.get('bytes')}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
                raise CorruptFileError(f"{name} has been modified: its SHA-256 differs")
    except OSError as error:
        raise CorruptFileError(f"{name}: {error.strerror}") from None


def _serialize(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _is_plain_name(name: str) -> bool:
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\0" not in name
