"""Strict parser of shard headers: accepts regular files with plain names only, and none of tar's other features.

Shards are never extracted. Their members have the `EXTENSIONS`; links, devices, sparse files, long-name records, paths,
members that exceed the file, and headers with a wrong checksum are rejected.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distav.config.errors import UserError, format_list
from distav.data.files import write_atomically

BLOCK = 512
MAX_MEMBER_BYTES = 1 << 30
EXTENSIONS = ("avi", "webm", "mp4", "flac", "json", "npy")
_NAME = re.compile(rb"[A-Za-z0-9_-]+(\.[a-z0-9]+|\.[a-z][a-z0-9_]*\.npy)")
_OCTAL = re.compile(rb"[0-7]+")


@dataclass(frozen=True)
class Member:
    """A file in a tar: the parts of its name, and where its content begins and how long it is, in bytes."""

    key: str
    extension: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """Yield the members of a shard in file order; reads their headers only.

    Raises:
        UserError: at the first header that is not allowed in a shard.
    """
    try:
        with open(path, "rb") as file:
            yield from _members(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _members(file: BinaryIO, file_size: int, path: Path) -> Iterator[Member]:
    offset = 0
    while True:
        header = os.pread(file.fileno(), BLOCK, offset)
        if header == bytes(BLOCK):
            return
        where = f"{path}, byte {offset}"
        if len(header) < BLOCK:
            raise UserError(f"{where}: the tar is truncated, its end mark is missing; copy the shard again.")
        _verify_checksum(header, where)
        name = _regular_file_name(header, where)
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: '{_printable(name)}' is not of the form key.extension or key.stream.npy.")
        key, _, extension = name.decode().partition(".")
        if extension.rpartition(".")[2] not in EXTENSIONS:
            raise UserError(
                f"{where}: '{_printable(name)}' has an unknown extension; allowed: {format_list(EXTENSIONS)}."
            )
        size = _octal(header[124:136], f"{where}: size of '{_printable(name)}'")
        offset += BLOCK
        if size > MAX_MEMBER_BYTES or offset + size > file_size:
            raise UserError(
                f"{where}: '{_printable(name)}' has an invalid size of {size} bytes; allowed: up to the end of the "
                f"file, and at most {MAX_MEMBER_BYTES}."
            )
        yield Member(key, extension, offset, size)
        offset += -(-size // BLOCK) * BLOCK


def _regular_file_name(header: bytes, where: str) -> bytes:
    """Return the name of a regular file; raise a UserError for any other type of member."""
    file_type, magic = header[156:157], header[257:263]
    name = header[:100].split(b"\0", 1)[0]
    if file_type not in (b"0", b"\0") or header[345:346] != b"\0" or magic not in (b"ustar\0", b"ustar "):
        raise UserError(
            f"{where}: '{_printable(name)}' is not a regular file (type {file_type!r}); shards contain no others."
        )
    return name


def _verify_checksum(header: bytes, where: str) -> None:
    expected = _octal(header[148:156], f"{where}: checksum of a tar header")
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != expected:
        raise UserError(f"{where}: tar header with a wrong checksum; the file is corrupt or not a tar.")


def _octal(field: bytes, what: str) -> int:
    digits = field.strip(b"\0 ")
    if not _OCTAL.fullmatch(digits):
        raise UserError(f"{what} is not an octal number; the file is corrupt or not a tar.")
    return int(digits, 8)


def _printable(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def members_by_key(path: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Return the members of a shard by key, in file order: {key: [(extension, offset, bytes), ...]}.

    Raises:
        UserError: for anything other than regular files, each once, with the members of a sample adjacent, as
            WebDataset requires.
    """
    samples: dict[str, list[tuple[str, int, int]]] = {}
    last = ""
    for member in members(path):
        if member.key in samples and member.key != last:
            raise UserError(f"{path}: the members of '{member.key}' are not adjacent.")
        parts = samples.setdefault(member.key, [])
        if any(member.extension == extension for extension, _, _ in parts):
            raise UserError(f"{path}: '{member.key}.{member.extension}' occurs twice.")
        parts.append((member.extension, member.offset, member.size))
        last = member.key
    return samples


def write_dali_index(tar: Path, members: dict[str, list[tuple[str, int, int]]], scratch: Path | None = None) -> None:
    """Write the `.idx` file of a shard, in the v1.2 format of DALI's wds2idx, as `write_atomically` does."""
    write_atomically(tar.with_suffix(".idx"), dali_index(members), scratch)


def dali_index(members: dict[str, list[tuple[str, int, int]]]) -> bytes:
    """Return the content of a shard's `.idx` file."""
    lines = [f"v1.2 {len(members)}"]
    for key, parts in members.items():
        lines.append(" ".join(f"{extension} {offset} {size} {key}.{extension}" for extension, offset, size in parts))
    return ("\n".join(lines) + "\n").encode()
