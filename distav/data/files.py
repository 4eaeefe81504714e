"""Atomic writes, Parquet tables, and directories that belong to one configuration."""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distav.config.errors import UserError


def read_table(path: Path, **options: Any) -> pa.Table:
    """Read a Parquet file.

    Args:
        path: the file.
        **options: passed on to `pyarrow.parquet.read_table`.

    Raises:
        UserError: if the file is missing or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; copy the complete dataset directory, or make the dataset again.")
    try:
        check_column_names(pq.read_schema(path))
        return pq.read_table(path, **options)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def check_column_names(schema: pa.Schema) -> None:
    """Raise ArrowInvalid if two columns have the same name."""
    duplicates = [name for name in schema.names if schema.names.count(name) > 1]
    if duplicates:
        raise pa.ArrowInvalid(f"more than one column is named '{duplicates[0]}'")


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a file so that it exists either completely or not at all, even with several concurrent writers.

    Args:
        path: the file.
        content: its bytes.
        scratch: directory for the temporary file, on the same file system; None: the directory of `path`.
    """
    part = temporary_path(path, scratch)
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_if_absent(path: Path, content: bytes) -> None:
    """Write a file atomically unless it exists; if several processes on any machines write it, the first one wins."""
    part = temporary_path(path)
    write_atomically(part, content)
    try:
        os.link(part, path)
        part.unlink()
    except FileExistsError:
        part.unlink()
    except OSError:  # A file system without hard links.
        os.replace(part, path)


def temporary_path(path: Path, scratch: Path | None = None) -> Path:
    """Return a path for an incomplete file that no other process on any machine uses.

    Args:
        path: the file once it is complete.
        scratch: directory of the temporary file; None: the directory of `path`.
    """
    return (scratch or path.parent) / f"{path.name}.{uuid.uuid4().hex[:12]}.part"


def write_table(path: Path, table: pa.Table, scratch: Path | None = None) -> None:
    """Write a Parquet file as `write_atomically` does."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes(), scratch)


def claim_dir(
    path: Path,
    facts: dict[str, Any],
    conflict: str,
    advice: str,
    describe_difference: Callable[[Any, Any], str] | None = None,
) -> None:
    """Record which configuration a directory belongs to, or verify that it belongs to this one.

    Any number of processes, on any machines, may call it at the same time.

    Args:
        path: JSON file that records the configuration; its directory is created if necessary.
        facts: the configuration, JSON values only.
        conflict: beginning of the error message, e.g. "out: holds embeddings made with other options".
        advice: end of the error message, e.g. "choose another --out or delete it".
        describe_difference: describes the first difference of two configurations; None: `first_difference`.

    Raises:
        UserError: if the directory belongs to another configuration (the message gives the first difference), or if
            the file cannot be written.
    """
    content = json.dumps(facts, indent=1, sort_keys=True).encode()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_if_absent(path, content)
        recorded = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; {advice}.") from None
    if recorded == content:
        return
    try:
        difference = (describe_difference or first_difference)(json.loads(recorded), json.loads(content))
    except (ValueError, RecursionError):
        difference = f"{path.name} is not valid JSON"
    raise UserError(f"{conflict} ({difference}); {advice}.")


def first_difference(recorded: Any, requested: Any, name_of: Callable[[str], str] = str, key: str = "") -> str:
    """Return the first key whose values differ, with both values.

    Args:
        recorded, requested: JSON values.
        name_of: returns the user's name of a dotted key.
        key: dotted key of the values.
    """
    if isinstance(recorded, dict) and isinstance(requested, dict):
        for name in sorted({*recorded, *requested}):
            if recorded.get(name) != requested.get(name):
                subkey = f"{key}.{name}" if key else name
                return first_difference(recorded.get(name), requested.get(name), name_of, subkey)
    name = name_of(key) if key else "content"
    old, new = ("nothing" if value is None else _shorten(value) for value in (recorded, requested))
    return f"{name}: {old} recorded, {new} requested"


def _shorten(value: Any, limit: int = 60) -> str:
    text = value if value and isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


_DISK_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another directory, or change the permissions"),
}


@contextlib.contextmanager
def report_os_errors(folder: Path, *, disk_only: bool = False) -> Iterator[None]:
    """Turn an OSError of the enclosed code into a UserError that says what to do.

    Args:
        folder: directory that the code writes to.
        disk_only: leave errors unchanged that are not about a full disk or missing permissions.
    """
    try:
        yield
    except OSError as error:
        advice = _DISK_ERRORS.get(error.errno or 0, "")
        if disk_only and not advice:
            raise
        reason = error.strerror or str(error)
        advice = f"{advice} and rerun" if advice else "rerun"
        raise UserError(f"{error.filename or folder}: {reason}; {advice} the same command to resume.") from error
