"""Where the samples of WebDataset tar files are: offset and size of each member, and what is damaged.

Only headers and members with labels are read. Members are grouped into samples by the webdataset library.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from distav.data.preparation.encoding import RejectedClip
from distav.data.storage.errors import StorageError
from distav.data.storage.remote_file import open_file

MAX_TEXT_BYTES = 16 << 20
"""Largest member with labels."""
_BLOCK = 512
_COPY_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Member:
    """Position of a member in a tar, in bytes."""

    offset: int
    size: int


@dataclass
class TarSample:
    """The members of a sample, or a fault of the tar.

    Attributes:
        key: key of the sample; empty for a fault of the tar.
        members: position of each member by its extension.
        text: content of the member with labels; None if there is none.
        faults: what is damaged.
        repeated: whether the tar has other members with the same key, which are not adjacent.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict[str, Member])
    text: bytes | None = None
    faults: list[str] = field(default_factory=list[str])
    repeated: bool = False


def copy_member(location: str, member: Member, target: BinaryIO) -> None:
    """Copy a member of a tar to a file.

    Raises:
        RejectedClip: if the tar cannot be read or ends before the member does.
    """
    remaining = member.size
    try:
        with open_file(location) as file:
            file.seek(member.offset)
            while remaining and (content := file.read(min(remaining, _COPY_BYTES))):
                target.write(content)
                remaining -= len(content)
    except (StorageError, OSError) as error:
        raise RejectedClip(_reason(error)) from None
    if remaining:
        raise RejectedClip(f"truncated: the tar ends {remaining} bytes before the end of the member")


def read_samples(location: str, text_extension: str, key_to_last_dot: bool = False) -> list[TarSample]:
    """Return the samples of a tar in file order, and then the faults of the tar.

    Args:
        location: path or URL.
        text_extension: extension of the member with labels, whose content is read.
        key_to_last_dot: whether a key ends at the last dot of a name instead of the first one.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys  # It imports torch, which workers do not need.

    faults: list[str] = []
    duplicates: list[str] = []

    def note_duplicate(error: Exception) -> bool:
        duplicates.append(str(error.args[0]).split(": duplicate")[0])
        return True

    samples = []
    try:
        with open_file(location) as file:
            files = ({"fname": entry.name, "data": entry, "__url__": location} for entry in _entries(file, faults))
            split_name = _split_at_last_dot if key_to_last_dot else base_plus_ext
            for group in group_by_keys(files, keys=split_name, handler=note_duplicate):
                sample = _sample(group, file, text_extension)
                sample.faults += [f"duplicate: {_printable(name)} occurs twice" for name in duplicates]
                duplicates.clear()
                samples.append(sample)
    except (StorageError, OSError) as error:
        faults.append(_reason(error))
    counts = Counter(sample.key for sample in samples)
    for sample in samples:
        sample.repeated = counts[sample.key] > 1
    return samples + [TarSample("", faults=[fault]) for fault in faults]


def _reason(error: StorageError | OSError) -> str:
    if isinstance(error, StorageError):
        return f"not readable: {error.reason}"
    return f"not readable: {error.strerror or error}"


def _split_at_last_dot(name: str) -> tuple[str | None, str | None]:
    """Return key and extension of a member name."""
    match = re.fullmatch(r"(.*[^/])\.([^./]+)", name)
    return (match[1], match[2]) if match else (None, None)


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _sample(group: dict[str, Any], file: BinaryIO, text_extension: str) -> TarSample:
    """Return the sample of a group of members, with the content of its member with labels."""
    sample = TarSample(_printable(group["__key__"]))
    file_size = file.seek(0, io.SEEK_END)
    for extension, entry in group.items():
        if extension.startswith("__"):
            continue
        if entry.issparse():
            sample.faults.append(f"not supported: {_printable(entry.name)} is a sparse file")
        elif not entry.isreg():
            sample.faults.append(f"not supported: {_printable(entry.name)} is a link to {_printable(entry.linkname)}")
        elif entry.size < 0 or entry.offset_data + entry.size > file_size:
            sample.faults.append(f"truncated: the tar ends within {_printable(entry.name)}")
        else:
            sample.members[extension] = Member(entry.offset_data, entry.size)
    text = sample.members.get(text_extension)
    if text is not None and text.size > MAX_TEXT_BYTES:
        sample.faults.append(f"no label: {text_extension} has {text.size} bytes; allowed: {MAX_TEXT_BYTES}")
    elif text is not None:
        file.seek(text.offset)
        sample.text = file.read(text.size)
    return sample


def _entries(file: BinaryIO, faults: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar; after a damaged header, continue at the next valid one.

    A hard link to an earlier member has the position of that member. Hidden files are left out, such as those in which
    macOS stores attributes: they would separate the members of a sample.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(_BLOCK)
    compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if compression or len(head) < _BLOCK:
        problem = f"compressed by {compression}; decompress it" if compression else f"{size} bytes"
        faults.append(f"not a tar: {problem}")
        return
    position: int | None = 0
    positions: dict[str, tuple[int, int]] = {}
    while position is not None:
        position = yield from _entries_from(file, position, size, faults, positions)


def _entries_from(
    file: BinaryIO, position: int, size: int, faults: list[str], positions: dict[str, tuple[int, int]]
) -> Generator[tarfile.TarInfo, None, int | None]:
    """Yield the files from a header on; `positions` collects offset and size of the regular ones by name.

    Returns:
        The position of the next valid header after a damaged one; None at the end of the tar.
    """
    file.seek(position)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if tar.offset <= position:
                    break
                position = tar.offset
                if entry.isreg() and not entry.issparse():
                    positions[entry.name] = entry.offset_data, entry.size
                elif entry.islnk() and entry.linkname in positions:
                    entry.type = tarfile.REGTYPE
                    entry.offset_data, entry.size = positions[entry.linkname]
                if (entry.isreg() or entry.islnk() or entry.issym()) and not _is_hidden(entry.name):
                    yield entry
    except (tarfile.TarError, ValueError, OverflowError, MemoryError):
        pass  # Also sizes that no file has.
    if position > size:
        return None
    file.seek(position)
    block = file.read(_BLOCK)
    if block == bytes(_BLOCK):
        return None
    if len(block) < _BLOCK:
        faults.append("truncated: the end mark is missing")
        return None
    next_position = _find_header(file, position + _BLOCK, size)
    skipped = (size if next_position is None else next_position) - position
    faults.append(f"damaged: no valid header at byte {position}, {skipped} bytes skipped")
    return next_position


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _find_header(file: BinaryIO, position: int, size: int) -> int | None:
    """Return the position of the first valid header at or after a position; None if there is none."""
    file.seek(position)
    while position < size:
        content = file.read(_COPY_BYTES)
        for start in range(0, len(content) - _BLOCK + 1, _BLOCK):
            block = content[start : start + _BLOCK]
            if block[257:262] == b"ustar" and _is_header(block):
                return position + start
        position += _COPY_BYTES
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
