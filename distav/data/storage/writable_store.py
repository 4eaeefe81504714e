"""Directories that files are copied to and from: in an object store, or on a file system."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from distav.data.files import temporary_path
from distav.data.storage.errors import ObjectNotFoundError, StorageError
from distav.data.storage.object_store import RemoteDirectory, is_url

WRITABLE_PROTOCOLS = ("s3", "gs", "gcs")
"""Protocols of URLs that can be written to."""
_CREDENTIALS_HELP = (
    "Credentials come from the usual environment, such as AWS_ACCESS_KEY_ID, AWS_PROFILE or "
    "GOOGLE_APPLICATION_CREDENTIALS; they must allow listing, reading, writing and deleting."
)
_BUCKET_HELP = "Create the bucket, or correct the URL."
_NETWORK_HELP = "Check the network, set AWS_ENDPOINT_URL if the store is not Amazon's, and try again."
_DIRECTORY_HELP = "Give a directory that can be written and has free space."
T = TypeVar("T")


class WritableStore(Protocol):
    """Files of one directory, by their name relative to it, with `/` between its parts.

    A file is replaced as a whole: readers see the old or the new content. All methods raise StorageError if the store
    cannot be read or written.
    """

    def sizes(self) -> dict[str, int]:
        """Return the sizes of all files in bytes by name; empty if the directory does not exist."""
        ...

    def read(self, name: str) -> bytes:
        """Return the content of a file; raise ObjectNotFoundError if it does not exist."""
        ...

    def download(self, name: str, path: Path) -> None:
        """Copy a file of the store to a path."""
        ...

    def upload(self, path: Path, name: str) -> None:
        """Copy a file to the store."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if it does not exist."""
        ...


def open_store(location: str, setting: str) -> WritableStore:
    """Return the store at a directory or URL, without accessing it.

    Args:
        location: a directory, or a URL such as `s3://bucket/directory`.
        setting: setting that has this value; errors name it.

    Raises:
        UserError: for an unsupported URL.
    """
    return _RemoteStore(location, setting) if is_url(location) else _LocalStore(Path(location), setting)


class _RemoteStore(RemoteDirectory):
    """A directory in an object store."""

    protocols = WRITABLE_PROTOCOLS

    def __init__(self, url: str, setting: str):
        self.setting = setting
        super().__init__(url)

    def sizes(self) -> dict[str, int]:
        try:
            entries = self._with_retries("", lambda system: system.find(self.url, detail=True))
        except ObjectNotFoundError:
            return {}
        root = self.url.partition("://")[2] + "/"
        return {name.removeprefix(root): entry["size"] for name, entry in entries.items() if name.startswith(root)}

    def read(self, name: str) -> bytes:
        return self._with_retries(name, lambda system: system.cat_file(self._address(name)))

    def upload(self, path: Path, name: str) -> None:
        os.stat(path)  # Its error would count as one of the store.
        self._with_retries(name, lambda system: system.put_file(str(path), self._address(name)))

    def delete(self, name: str) -> None:
        try:
            self._with_retries(name, lambda system: system.rm_file(self._address(name)))
        except ObjectNotFoundError:
            return

    def _error(self, name: str, status: int, detail: str) -> StorageError:
        where = name or "the directory"
        if status == 404:
            return ObjectNotFoundError(
                self.url, f"{where}: no such file or bucket ({detail})", _BUCKET_HELP, self.setting
            )
        if status in (401, 403):
            reason = f"no permission to list, read or write {where} ({detail})"
            return StorageError(self.url, reason, _CREDENTIALS_HELP, self.setting)
        return StorageError(
            self.url, f"{where} cannot be listed, read or written ({detail})", _NETWORK_HELP, self.setting
        )


class _LocalStore:
    """A directory of a file system."""

    def __init__(self, folder: Path, setting: str):
        self.folder, self.setting = folder, setting

    def sizes(self) -> dict[str, int]:
        def measure() -> dict[str, int]:
            paths = (path for path in self.folder.rglob("*") if path.is_file() and not path.name.endswith(".part"))
            return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

        return self._checked("", measure)

    def read(self, name: str) -> bytes:
        return self._checked(name, (self.folder / name).read_bytes)

    def download(self, name: str, path: Path) -> None:
        self._checked(name, lambda: shutil.copyfile(self.folder / name, path))

    def upload(self, path: Path, name: str) -> None:
        target = self.folder / name
        part = temporary_path(target)
        os.stat(path)  # Its error would count as one of the store.

        def copy() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, target)

        try:
            self._checked(name, copy)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    def delete(self, name: str) -> None:
        path = self.folder / name

        def remove() -> None:
            path.unlink(missing_ok=True)
            if path.parent != self.folder and not any(path.parent.iterdir()):
                path.parent.rmdir()

        self._checked(name, remove)

    def _checked(self, name: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            reason, location = error.strerror or str(error), str(self.folder)
            if isinstance(error, FileNotFoundError):
                raise ObjectNotFoundError(
                    location, f"{name} is not found ({reason})", _DIRECTORY_HELP, self.setting
                ) from None
            what = f"{name or 'the directory'} cannot be read or written ({reason})"
            raise StorageError(location, what, _DIRECTORY_HELP, self.setting) from None
