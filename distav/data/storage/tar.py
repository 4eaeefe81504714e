"""Reading the headers of a shard, strictly: plain files with plain names, and nothing that tar can do besides.

Shards are never extracted. What they may hold is listed in `EXTENSIONS`; links, devices, sparse files, long-name
records, paths, members said to be larger than the file, and headers whose sum is wrong are refused.
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
"""Largest member."""
EXTENSIONS = ("avi", "webm", "mp4", "flac", "json", "npy")
_NAME = re.compile(rb"[A-Za-z0-9_-]+(\.[a-z0-9]+|\.[a-z][a-z0-9_]*\.npy)")
_NUMBER = re.compile(rb"[0-7]+")


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name without and with extension, where its content begins, and its length in bytes."""

    key: str
    extension: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """Yield the members of a shard in file order, reading no more than their headers.

    Raises:
        UserError: at the first thing that a shard may not hold.
    """
    try:
        with open(path, "rb") as file:
            yield from _members(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _members(file: BinaryIO, length: int, path: Path) -> Iterator[Member]:
    place = 0
    while True:
        header = os.pread(file.fileno(), BLOCK, place)
        if header == bytes(BLOCK):
            return
        where = f"{path}, byte {place}"
        if len(header) < BLOCK:
            raise UserError(f"{where}: the tar breaks off without its end mark; copy the shard again.")
        _check_sum(header, where)
        kind, magic = header[156:157], header[257:263]
        raw = header[:100].split(b"\0", 1)[0]
        shown = raw.decode(errors="backslashreplace")
        if kind not in (b"0", b"\0") or header[345:346] != b"\0" or magic not in (b"ustar\0", b"ustar "):
            raise UserError(f"{where}: '{shown}' is no plain file (kind {kind!r}); shards hold nothing else.")
        if not _NAME.fullmatch(raw):
            raise UserError(f"{where}: '{shown}' is no plain name of the form key.extension, or key.stream.npy.")
        key, _, extension = raw.decode().partition(".")
        if extension.rpartition(".")[2] not in EXTENSIONS:
            raise UserError(
                f"{where}: '{shown}': members of this kind are not read; allowed: {format_list(EXTENSIONS)}."
            )
        size = _number(header[124:136], f"{where}: size of '{shown}'")
        place += BLOCK
        if size > MAX_MEMBER_BYTES or place + size > length:
            raise UserError(
                f"{where}: '{shown}' is said to have {size} bytes, more than the file or than {MAX_MEMBER_BYTES}."
            )
        yield Member(key, extension, place, size)
        place += -(-size // BLOCK) * BLOCK


def _check_sum(header: bytes, where: str) -> None:
    told = _number(header[148:156], f"{where}: sum of a header")
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != told:
        raise UserError(f"{where}: this is no tar header, its sum is wrong; the file is damaged, or no tar.")


def _number(field: bytes, what: str) -> int:
    digits = field.strip(b"\0 ")
    if not _NUMBER.fullmatch(digits):
        raise UserError(f"{what} is no octal number; the file is damaged, or no tar.")
    return int(digits, 8)


def members_by_key(path: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Return the members of a shard by key: {key: [(extension, offset, bytes), ...]}, in file order.

    Raises:
        UserError: for anything but plain files whose members stand together, each once, as WebDataset needs.
    """
    found: dict[str, list[tuple[str, int, int]]] = {}
    last = ""
    for member in members(path):
        if member.key in found and member.key != last:
            raise UserError(f"{path}: the members of '{member.key}' do not stand together.")
        parts = found.setdefault(member.key, [])
        if any(member.extension == extension for extension, _, _ in parts):
            raise UserError(f"{path}: '{member.key}.{member.extension}' is there twice.")
        parts.append((member.extension, member.offset, member.size))
        last = member.key
    return found


def write_dali_index(tar: Path, members: dict[str, list[tuple[str, int, int]]], scratch: Path | None = None) -> None:
    """Write the `.idx` beside a shard, in the v1.2 format of DALI's wds2idx, as `write_atomically` does."""
    write_atomically(tar.with_suffix(".idx"), dali_index(members), scratch)


def dali_index(members: dict[str, list[tuple[str, int, int]]]) -> bytes:
    """Return the content of a shard's `.idx`."""
    lines = [f"v1.2 {len(members)}"]
    for key, parts in members.items():
        lines.append(" ".join(f"{extension} {offset} {size} {key}.{extension}" for extension, offset, size in parts))
    return ("\n".join(lines) + "\n").encode()
