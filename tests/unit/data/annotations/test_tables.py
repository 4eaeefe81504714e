"""Tables of users are read strictly: every malformed row is an error with its line."""

from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.data.annotations.tables import TableFormat, read_csv, read_utf8

CLIPS = TableFormat("path,label[,split]", ("path", "label"), ("split",))
NOTES = TableFormat("key,label", ("key", "label"), ("pair",), others_allowed=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "list.csv"


def test_whitespace_byte_order_mark_and_blank_lines_are_no_content(path: Path):
    path.write_bytes(
        '\ufeffpath , "label"\r\n\r\n "a, b.mp4" , dog \r\n   \r\nc.mp4," dog "\r\n'.replace('" ,', '",').encode()
    )
    table = read_csv(path, "list", CLIPS)
    assert table.columns == {"path": ["a, b.mp4", "c.mp4"], "label": ["dog", "dog"]}
    assert [table.position(row) for row in range(len(table))] == ["list, line 3", "list, line 5"]


def test_rows_of_empty_cells_are_skipped(path: Path):
    path.write_text("path,label\n,\na.mp4,dog\n , \n,\n")
    table = read_csv(path, "list", CLIPS)
    assert table.columns["path"] == ["a.mp4"] and table.position(0) == "list, line 3"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_counted_with_any_line_ending(path: Path, newline: str):
    path.write_bytes(newline.join(["path,label", "a.mp4,dog", "b.mp4,cat,x", ""]).encode())
    with pytest.raises(UserError, match="list, line 3: 3 cells, the header has 2: 'b.mp4,cat,x'"):
        read_csv(path, "list", CLIPS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"list is empty; the first line has to be the header path,label\[,split\]"),
        ("\n \n", "list is empty"),
        ("a.mp4,dog\nb.mp4,cat\n", "line 1: column 'path' is missing; the first line has to be the header path,label"),
        ("pth,label\na,b\n", "line 1: unknown column 'pth'; allowed: path, label, split. Did you mean 'path'"),
        ("Path,label\na,b\n", "line 1: unknown column 'Path'; .* Did you mean 'path'"),
        ("path,label,fold\na,b,1\n", "line 1: unknown column 'fold'; allowed: path, label, split.$"),
        ("path,label,path\na,b,c\n", "line 1: more than one column is named 'path'"),
        ("path,label,\na,b,\n", "line 1: column 3 has no name"),
        ("path;label\na;b\n", "line 1: the columns are separated by semicolons: 'path;label'; separate them by commas"),
        ("path\tlabel\na\tb\n", "line 1: the columns are separated by tabs"),
        ("path,label\na;b\n", "line 2: 1 cell, .*the cells are separated by semicolons; separate them by commas"),
        (
            "path,label,split\na,playing violin, fiddle,train\n",
            "line 2: 4 cells, .* put a cell that contains a comma in",
        ),
        ("path,label,split\na,dog\n", "line 2: 2 cells, the header has 3: 'a,dog'; write all cells"),
        (
            'path,label\na,x\nb,"dog\nc,y\nd,z\n',
            r"""line 3: the quotes \("\) in 'b,"dog' are not balanced \(unexpected end""",
        ),
        ('path,label\na,"dog\nb,"cat"\n', "line 2: the quotes .* are not balanced"),
        ('path,label\na,dog"\n', "line 2: the quotes .*odd number of quotes"),
        ('path,label\na,"dog\nb,cat"\n', r"line 2: label 'dog\\nb,cat' contains a line break"),
        ('path,label,split\na,dog"\nb,cat,"train\n', "line 2: the quotes"),
    ],
)
def test_malformed_content_is_reported_with_its_line(path: Path, content: str, message: str):
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_csv(path, "list", CLIPS)
    assert str(error.value).startswith("list")


def test_other_columns_may_contain_line_breaks_where_they_are_allowed(path: Path):
    path.write_text('key,label,note\nk,dog,"first\nsecond"\nl,cat,x\n')
    table = read_csv(path, "list", NOTES)
    assert table.columns["note"] == ["first\nsecond", "x"] and table.row_numbers == [2, 4]
    path.write_text('key,label,note\nk,dog,"first\nl,cat,"x"\n')
    with pytest.raises(UserError, match="line 2: the quotes"):
        read_csv(path, "list", NOTES)
    path.write_text("key,label,pairs\nk,dog,\n")
    with pytest.raises(UserError, match="unknown column 'pairs'.*Did you mean 'pair'"):
        read_csv(path, "list", NOTES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\na,b\nc,\xe4\n", "list, line 3: byte 0xe4 is not UTF-8; save the file as UTF-8"),
        ("path,label\n".encode("utf-16"), "list: the file is UTF-16; save it as UTF-8"),
        (b"path,label\na,\0\n", "list, line 2: contains a NUL character"),
    ],
)
def test_other_encodings_are_reported(path: Path, content: bytes, message: str):
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_utf8(path, "list")


def test_missing_file_and_directory_are_reported(tmp_path: Path):
    with pytest.raises(UserError, match="list: no such file"):
        read_utf8(tmp_path / "none.csv", "list")
    with pytest.raises(UserError, match="list: a directory, not a file"):
        read_utf8(tmp_path, "list")
