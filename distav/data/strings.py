"""Columns of strings in memory-mapped Arrow files, without a Python object for each string. Legend: N strings."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class StringColumn(Sequence[str]):
    """N strings; Python strings are created for those that are read.

    The strings are in an Arrow file that only this process maps. Its pages are read when they are needed, and the
    system may drop them from memory.
    """

    def __init__(self, strings: pa.ChunkedArray):
        """Write the strings to a file in the directory for temporary files; without space there, keep them in memory.

        Args:
            strings: [N] strings without nulls.
        """
        self.array: pa.Array = _memory_mapped(strings)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int | np.integer) -> str: ...

    @overload
    def __getitem__(self, index: "slice | Sequence[int] | np.ndarray") -> np.ndarray: ...

    def __getitem__(self, index: Any) -> Any:
        """Return one string, or an array of those at the indices or in the mask."""
        if isinstance(index, int | np.integer):
            return self.array[int(index)].as_py()
        return np.array(self.array.take(pa.array(np.arange(len(self))[index])).to_pylist(), dtype=object)

    def __iter__(self) -> Iterator[str]:
        return (text.as_py() for text in self.array)

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        """Return the Arrow array, so that `pa.table` takes the column without a copy."""
        return self.array if type is None else self.array.cast(type)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return an array of all strings, for the functions of NumPy."""
        return np.array(self.tolist(), dtype=object if dtype is None else dtype)

    def tolist(self) -> list[str]:
        """Return all strings as a list."""
        return self.array.to_pylist()

    def codes(self) -> np.ndarray:
        """Return the index of each string among the sorted distinct ones, [N] int64."""
        encoded = self.array.dictionary_encode()
        order = pc.sort_indices(encoded.dictionary).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks[encoded.indices.to_numpy()]

    def positions(self, texts: Sequence[Any]) -> list[int | None]:
        """Return the index of each text in the column; None for other texts and for values that are not texts."""
        values = pa.array([text if isinstance(text, str) else None for text in texts], self.array.type)
        found = pc.index_in(values, value_set=self.array)  # pyright: ignore[reportAttributeAccessIssue]
        return found.to_pylist()


def _memory_mapped(strings: pa.ChunkedArray) -> pa.Array:
    """Return strings in a file without a name, whose space is freed with the array."""
    # One array: large strings, whose offsets have 64 bits, can be combined whatever their total size.
    array = strings.cast(pa.large_string()).combine_chunks()
    table = pa.table({"strings": array})
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(suffix=".arrow")
        os.close(descriptor)
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        column = pa.ipc.open_file(pa.memory_map(path)).read_all().column("strings")
    except OSError:
        return array
    finally:
        if path:
            os.unlink(path)
    return column.chunk(0) if column.num_chunks == 1 else array
