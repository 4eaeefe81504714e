"""Rows of Parquet tables and the media files in their cells."""

from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from distav.data.preparation.encoding import RejectedClip
from distav.data.preparation.media.embedded import EmbeddedFile

_BUFFER_BYTES = 1 << 20


class _RowReader:
    """Reads rows of a row group in order, one at a time; memory holds a data page, at most the row group."""

    def __init__(self, path: str, columns: tuple[str, ...], group: int):
        self.file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        present = [column for column in columns if column in self.file.schema_arrow.names]
        self.batches = self.file.iter_batches(1, row_groups=[group], columns=present)
        self.position = 0

    def read(self, row: int) -> dict[str, Any]:
        """Return the values of a row, which is not before the last one that was read."""
        batch = None
        while self.position <= row:
            batch = next(self.batches)
            self.position += 1
        assert batch is not None
        return batch.to_pylist()[0]


_reader: tuple[tuple[str, tuple[str, ...], int], _RowReader] | None = None
"""The row group that this process reads."""


def read_row(path: str, columns: tuple[str, ...], group: int, row: int) -> dict[str, Any]:
    """Return the values of a row by column.

    Raises:
        RejectedClip: if it cannot be read.
    """
    global _reader
    key = (path, columns, group)
    try:
        if _reader is None or _reader[0] != key or _reader[1].position > row:
            _reader = key, _RowReader(path, columns, group)
        return _reader[1].read(row)
    except (pa.ArrowException, OSError, StopIteration) as error:
        _reader = None
        raise RejectedClip(f"not readable: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def media_file(value: object, folder: Path) -> EmbeddedFile | Path | None:
    """Return the media of a cell: a file inside the table, a file in the folder of the table, or None."""
    path, content = (None, value) if isinstance(value, bytes) else (value, None)
    if isinstance(value, dict):
        path, content = value.get("path"), value.get("bytes")
    if isinstance(content, bytes):
        extension = Path(str(path or "")).suffix.lstrip(".")
        return EmbeddedFile(extension if extension.isalnum() else "bin", _writer(content))
    return folder / str(path) if path else None


def _writer(content: bytes) -> Any:
    def copy_to(file: BinaryIO) -> None:
        file.write(content)

    return copy_to
