"""Folders whose files are known by size and digest: what was altered, cut short or lost since is recognised.

The digests tell damage, not malice: whoever can write the folder can write its manifest too.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_MOST_BYTES = 64 << 20
"""Largest manifest that is read."""


class CorruptFileError(Exception):
    """A file is not what was written, with the reason."""


def sync(path: Path) -> None:
    """Have the system put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_entry(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, after it was put on disk."""
    sync(path)
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a folder, the last of its files.

    Args:
        folder: the folder.
        files: what `described` said of each file, by name.
    """
    path = folder / MANIFEST
    path.write_bytes(_sealed({"format": 1, "files": files}))
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files that a sealed folder should have.

    Raises:
        Damaged: where the manifest is missing or is not as it was written.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CorruptFileError(f"{MANIFEST} is larger than {_MOST_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise CorruptFileError(f"{MANIFEST}: {error.strerror}") from None
    return parse_manifest(content)


def parse_manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """Return the files that a manifest names.

    Raises:
        Damaged: where the bytes are not those of a manifest.
    """
    try:
        found = json.loads(content)
        whole = isinstance(found, dict) and _sealed({key: found[key] for key in found if key != "sha256"}) == content
    except (ValueError, RecursionError):
        whole, found = False, {}
    if not whole:
        raise CorruptFileError(f"{MANIFEST} is not as it was written")
    files = found.get("files")
    if not isinstance(files, dict) or not all(_plain(name) and isinstance(each, dict) for name, each in files.items()):
        raise CorruptFileError(f"{MANIFEST} names no plain files")
    return files


def verify_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Compare a file with its entry in the manifest.

    Raises:
        Damaged: where it is missing, of another size or of another content.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise CorruptFileError(f"{name} has {size} bytes of {expected.get('bytes')}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
                raise CorruptFileError(f"{name} was altered, its SHA-256 differs")
    except OSError as error:
        raise CorruptFileError(f"{name}: {error.strerror}") from None


def _sealed(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _plain(name: str) -> bool:
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\0" not in name
