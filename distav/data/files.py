"""Atomic writes and Parquet tables."""

import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distav.config.errors import UserError


def read_table(path: Path, **options: Any) -> pa.Table:
    """Read a Parquet file, or raise a UserError that names it."""
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the whole folder, or make it anew.")
    try:
        return check_column_names(pq.read_table(path, **options))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def check_column_names(table: pa.Table) -> pa.Table:
    """Return the table, or raise ArrowInvalid where two columns have one name."""
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise pa.ArrowInvalid(f"column '{twice[0]}' is there more than once")
    return table


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a file so that it is either whole or not there, whoever else writes it at the same time.

    Args:
        path: the file.
        content: of it.
        scratch: folder of the same file system in which it lies until it is whole; the file's own where None.
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


def temporary_path(path: Path, scratch: Path | None = None) -> Path:
    """Return a name for a file until it is whole, which no other process on any machine takes."""
    return (scratch or path.parent) / f"{path.name}.{uuid.uuid4().hex[:12]}.part"


def write_table(path: Path, table: pa.Table, scratch: Path | None = None) -> None:
    """Write a Parquet file as `write_atomically` does."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes(), scratch)
