"""Tables that a user writes or edits, read strictly: a malformed row is an error that names its line.

Whitespace around the cells and column names of a CSV table is removed, also inside quotes.
"""

import csv
import difflib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distav.config.errors import UserError, format_list
from distav.data.files import read_table

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True)
class TableFormat:
    """The columns of a table.

    Attributes:
        header: first line of such a table, for error messages, e.g. `path,label[,split]`.
        required: columns that have to be present.
        optional: further columns that are read.
        others_allowed: whether a table may have other columns, which are ignored. A column with nearly the name of an
            absent one is an error in any case.
        separator: character between the cells.
        mistaken: column by which a table is recognized that was given instead of this one, and what to use.
    """

    header: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    others_allowed: bool = False
    separator: str = ","
    mistaken: tuple[str, str] = ("", "")

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Required and optional columns."""
        return self.required + self.optional


@dataclass(frozen=True)
class Table:
    """A table and the position of its rows in the file.

    Attributes:
        name: the table in error messages, e.g. `csv clips.csv`.
        columns: values by column; text if the table is a CSV file.
        row_unit: `line` of a CSV file, or `row` of a Parquet file.
        row_numbers: number of each row, from 1.
    """

    name: str
    columns: dict[str, list[Any]]
    row_unit: str
    row_numbers: list[int]

    def position(self, row: int) -> str:
        """Return the table and the position of a row, for error messages, e.g. `csv clips.csv, line 4`."""
        return f"{self.name}, {self.row_unit} {self.row_numbers[row]}"

    def __len__(self) -> int:
        return len(self.row_numbers)


def read_user_table(path: Path, name: str, table_format: TableFormat) -> Table:
    """Read a CSV or Parquet table, according to the extension of its file name.

    Args:
        path: the file.
        name: the table in error messages, e.g. `data.label_overrides=labels.csv`.
        table_format: its columns.

    Raises:
        UserError: if the file cannot be read, does not have this format, or has no rows.
    """
    table = _read(path, name, table_format)
    if not len(table):
        raise UserError(f"{name}: has a header, but no rows.")
    return table


def _read(path: Path, name: str, table_format: TableFormat) -> Table:
    extension = path.suffix.lower()
    if extension == ".csv":
        return read_csv(path, name, table_format)
    if not path.is_file():
        raise UserError(f"{name}: no such file.")
    if extension != ".parquet":
        raise UserError(f"{name}: the file name has to end in .csv or .parquet.")
    table = read_table(path)
    _check_columns(table.column_names, name, table_format)
    columns = {column: table.column(column).to_pylist() for column in table.column_names}
    return Table(name, columns, "row", list(range(1, len(table) + 1)))


def read_csv(path: Path, name: str, table_format: TableFormat) -> Table:
    """Read a CSV table in UTF-8, with or without byte-order mark; blank lines and rows without content are skipped.

    Every row has to have as many cells as the header, and quotes have to be balanced. Only columns that are not read
    may contain line breaks.

    Args:
        path: the file.
        name: the table in error messages, e.g. `csv clips.csv`.
        table_format: its columns.

    Raises:
        UserError: if the file cannot be read, or does not have this format; the message names the line.
    """
    records = _records(read_utf8(path, name), name, table_format.separator)
    first = next(records, None)
    if first is None:
        raise UserError(f"{name} is empty; the first line has to be the header {table_format.header}.")
    header = first.cells
    _check_separator(first, name, table_format.separator)
    _check_columns(header, f"{name}, line {first.line}", table_format)
    rows: list[list[str]] = []
    lines: list[int] = []
    for record in records:
        _check_record(record, header, name, table_format)
        rows.append(record.cells)
        lines.append(record.line)
    columns = {column: [row[index] for row in rows] for index, column in enumerate(header)}
    return Table(name, columns, "line", lines)


def read_utf8(path: Path, name: str) -> str:
    """Return the content of a text file in UTF-8, without byte-order mark and with its own line endings.

    Args:
        path: the file.
        name: the file in error messages.

    Raises:
        UserError: if the file cannot be read, or is not text in UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{name}: {'a directory, not a file' if path.is_dir() else 'no such file'}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}.") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}: the file is UTF-16; save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from None
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise UserError(f"{name}, line {line}: contains a NUL character; save the file as text in UTF-8.")
    return text


@dataclass(frozen=True)
class _Record:
    """One record of a CSV file: its first line, its cells without whitespace around them, and its text."""

    line: int
    cells: list[str]
    text: str

    @property
    def excerpt(self) -> str:
        """First characters of the record, for error messages."""
        text = self.text.rstrip("\r\n")
        return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _records(text: str, name: str, separator: str) -> Iterator[_Record]:
    """Yield the records with content."""
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator != "\t")
    while True:
        start = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            record = _Record(start + 1, [], lines[start])
            raise _quote_error(record, name, str(error)) from None
        if cells is None:
            return
        record = _Record(start + 1, [cell.strip() for cell in cells], "".join(lines[start : reader.line_num]))
        if record.text.count('"') % 2:
            raise _quote_error(record, name, "odd number of quotes")
        if any(record.cells):  # Spreadsheets also write rows of empty cells.
            yield record


def _quote_error(record: _Record, name: str, reason: str) -> UserError:
    return UserError(
        f'{name}, line {record.line}: the quotes (") in {record.excerpt} are not balanced ({reason}); close every '
        'quote in its line, put complete cells in quotes, and write "" for a quote inside one.'
    )


def _check_separator(header: _Record, name: str, separator: str) -> None:
    """Raise an error if the header consists of one cell that contains another separator."""
    if len(header.cells) > 1:
        return
    for other, description in _SEPARATORS.items():
        if other != separator and other in header.cells[0]:
            raise UserError(
                f"{name}, line {header.line}: the columns are separated by {description}: {header.excerpt}; separate "
                f"them by {_SEPARATORS[separator]}."
            )


def _check_columns(header: list[str], name: str, table_format: TableFormat) -> None:
    """Raise an error for a column that is missing, unknown or repeated."""
    for position, column in enumerate(header):
        if not column:
            raise UserError(f"{name}: column {position + 1} has no name; the header is {format_list(header)}.")
        if column in header[:position]:
            raise UserError(f"{name}: more than one column is named '{column}'; remove one.")
    unknown = [column for column in header if column not in table_format.read_columns]
    absent = [column for column in table_format.read_columns if column not in header]
    allowed = f"allowed: {format_list(table_format.read_columns)}"
    for column in unknown:
        intended = next((other for other in absent if _is_misspelling(column, other)), None)
        if intended:
            raise UserError(f"{name}: unknown column '{column}'; {allowed}. Did you mean '{intended}'?")
    missing = [column for column in table_format.required if column not in header]
    column, hint = table_format.mistaken
    if missing and column in header:
        raise UserError(f"{name}: column '{missing[0]}' is missing; {hint}.")
    if missing:
        raise UserError(
            f"{name}: column '{missing[0]}' is missing; the first line has to be the header {table_format.header}; "
            f"found: {format_list(header)}."
        )
    if unknown and not table_format.others_allowed:
        raise UserError(f"{name}: unknown column '{unknown[0]}'; {allowed}.")


def _is_misspelling(name: str, column: str) -> bool:
    """Return whether a name is probably meant to be a column, unlike a longer name such as `given_label`."""
    return difflib.SequenceMatcher(None, name.casefold(), column).ratio() >= 0.8


def _check_record(record: _Record, header: list[str], name: str, table_format: TableFormat) -> None:
    """Raise an error for a record with another number of cells than the header, or with a line break."""
    where = f"{name}, line {record.line}"
    if len(record.cells) != len(header):
        counts = f"{len(record.cells)} {'cell' if len(record.cells) == 1 else 'cells'}, the header has {len(header)}"
        raise UserError(f"{where}: {counts}: {record.excerpt}; {_count_hint(record, header, table_format.separator)}.")
    for column, cell in zip(header, record.cells, strict=True):
        if column in table_format.read_columns and ("\n" in cell or "\r" in cell):
            raise UserError(
                f"{where}: {column} {cell[:40]!r} contains a line break; it is not allowed in this column. Is a quote "
                f'(") in line {record.line} not closed?'
            )


def _count_hint(record: _Record, header: list[str], separator: str) -> str:
    """Return what to do about a record with the wrong number of cells."""
    if "\n" in record.text.rstrip("\r\n"):
        return f'close the quote (") that begins in line {record.line}'
    for other, description in _SEPARATORS.items():
        if other != separator and len(record.cells) == 1 and record.text.count(other) == len(header) - 1:
            return f"the cells are separated by {description}; separate them by {_SEPARATORS[separator]}"
    if len(record.cells) > len(header):
        character = {",": "comma", "\t": "tab"}[separator]
        return f'put a cell that contains a {character} in quotes, as in "a{separator} b", or remove the last cell'
    return "write all cells; those of optional columns may be empty"
