"""The files of a directory tree, and what in it is not used."""

import os
from collections.abc import Iterator
from pathlib import Path

from distav.config.errors import UserError, format_list

_NUM_EXAMPLES = 3


class SkippedPaths:
    """Paths in a directory that are not used, with the reason; hidden files and directories are not recorded.

    Args:
        root: the directory; paths are reported relative to it.
    """

    def __init__(self, root: Path):
        self.root = root
        self._names: dict[tuple[str, str], list[str]] = {}

    def add(self, singular: str, plural: str, path: Path) -> None:
        """Record a path.

        Args:
            singular: description of one such path.
            plural: description of several such paths.
            path: the path.
        """
        self._names.setdefault((singular, plural), []).append(printable_name(path.relative_to(self.root)))

    def summary(self) -> str:
        """Return number and first names of the paths for each reason; empty if there are none."""
        parts: list[str] = []
        for (singular, plural), names in sorted(self._names.items()):
            description = singular if len(names) == 1 else plural
            parts.append(f"{len(names)} {description} ({format_list(sorted(names), _NUM_EXAMPLES)})")
        return ", ".join(parts)


def list_directory(folder: Path, skipped: SkippedPaths) -> tuple[list[Path], list[Path]]:
    """Return the directories and the regular files in a directory, sorted, without hidden ones.

    Links to files and directories are returned like these. What is neither, such as a dangling link, and links to the
    directory itself or to one above it are recorded in `skipped`.

    Raises:
        OSError: if the directory cannot be read.
    """
    folders: list[Path] = []
    files: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            skipped.add("link to a directory above it", "links to a directory above them", path)
        elif path.is_dir():
            folders.append(path)
        elif path.is_file():
            files.append(path)
        elif path.is_symlink():
            skipped.add("dangling link", "dangling links", path)
        else:
            skipped.add("path that is not a file", "paths that are not files", path)
    return folders, files


def walk_files(folder: Path, skipped: SkippedPaths) -> Iterator[Path]:
    """Yield all files in a directory and in its subdirectories, without hidden ones.

    Links to subdirectories are not followed. They and unreadable subdirectories are recorded in `skipped`.

    Raises:
        UserError: if the directory itself cannot be read.
    """
    try:
        folders, files = list_directory(folder, skipped)
    except OSError as error:
        if folder == skipped.root:
            raise UserError(f"{printable_name(folder)}: {error.strerror}.") from None
        skipped.add("unreadable directory", "unreadable directories", folder)
        return
    yield from files
    for subfolder in folders:
        if subfolder.is_symlink():
            skipped.add("link to a directory", "links to directories", subfolder)
        else:
            yield from walk_files(subfolder, skipped)


def printable_name(path: Path) -> str:
    r"""Return a path as text; bytes that are not UTF-8 are written as \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
