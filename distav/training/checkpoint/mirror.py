"""Mirror of a run: a copy of its checkpoints and results in an object store or on another file system (`run.mirror`).

The manifest of a checkpoint is copied last and deleted first, so that an interrupted copy never counts as a complete
checkpoint. Results are copied before it: they are at least as new as the newest complete checkpoint.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from distav.config.errors import UserError
from distav.data.files import temporary_path
from distav.data.integrity import MANIFEST, CorruptFileError, read_manifest, sync, verify_file
from distav.data.storage.errors import ObjectNotFoundError, StorageError
from distav.data.storage.object_store import is_url
from distav.data.storage.writable_store import open_store
from distav.training.checkpoint.files import is_checkpoint_name

CHECKPOINTS = "checkpoints"
"""Directory of the checkpoints in a run directory and in its mirror."""
_DESCRIPTION = ("config.yaml", "environment.json")
_RESULT_FILES = ("metrics.jsonl", "report.json")
_RESULT_DIRS = ("labels", "tensorboard", "trackers", "export")
_GROWING = ("metrics.jsonl", "tensorboard", "trackers")
"""Results that this process may append to while they are copied."""
_SNAPSHOT = ".mirror-snapshot"
_CONNECTIONS = 8


class RunMirror:
    """Mirror of one run directory. Only the main rank accesses it.

    Attributes:
        location: directory or URL of the mirror.
        folder: the run directory.
    """

    def __init__(self, root: str, folder: Path, keep: int):
        """Verify the location, without accessing it.

        Args:
            root: value of `run.mirror`; the mirror is its directory with the name of the run.
            folder: the run directory.
            keep: number of checkpoints to keep in the mirror.

        Raises:
            UserError: if the URL is not supported, or the mirror is the run directory itself.
        """
        self.location, self.folder, self.keep = f"{root.rstrip('/')}/{folder.name}", folder, keep
        self.store = open_store(self.location, "run.mirror")
        if not is_url(root) and Path(self.location).resolve() == folder.resolve():
            raise UserError(
                f"run.mirror={root}: this is run.root, where the run itself is. Allowed: a directory on another file "
                "system, or a URL such as s3://bucket/directory."
            )
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and modification time of each result when it was last copied, by name."""

    def read_config(self) -> str | None:
        """Return config.yaml of the mirrored run; None if the mirror is empty.

        Raises:
            UserError: if the mirror cannot be read, or holds something else than a run.
        """
        try:
            return self.store.read("config.yaml").decode(errors="replace")
        except ObjectNotFoundError:
            if names := sorted(self.store.sizes()):
                raise UserError(
                    f"run.mirror={self.location}: it holds {names[0]}, but no config.yaml of a run. Choose another "
                    "run.mirror or run.name, or delete these files."
                ) from None
            return None

    def write_description(self) -> None:
        """Copy config.yaml and environment.json; raises StorageError if the mirror cannot be written."""
        for name in _DESCRIPTION:
            self.store.upload(self.folder / name, name)

    def list_checkpoints(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first; raises StorageError if they cannot be listed."""
        return _complete(self.store.sizes())

    def download(self, name: str, incomplete: Path) -> str | None:
        """Copy a checkpoint into a directory, verify its sizes and SHA-256, and copy the results to the run directory.

        Returns:
            Why the checkpoint is corrupt; None if it is valid. The results are copied only if it is.

        Raises:
            StorageError: if the mirror cannot be read.
        """
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)

        def download_file(file: str) -> None:
            self.store.download(f"{CHECKPOINTS}/{name}/{file}", incomplete / file)

        try:
            download_file(MANIFEST)
            entries = read_manifest(incomplete)
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                list(pool.map(download_file, entries))
            for file, entry in entries.items():
                verify_file(incomplete, file, entry)
                sync(incomplete / file)
        except (CorruptFileError, ObjectNotFoundError) as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            return str(error)
        self._download_results()
        sync(incomplete)
        return None

    def upload(self, checkpoint: Path | None) -> None:
        """Copy the results that changed and a checkpoint, then delete checkpoints that are no longer kept.

        Args:
            checkpoint: complete checkpoint of the run directory, which must exist until this returns; None for none.

        Raises:
            StorageError: if the mirror cannot be read or written.
            OSError: if a file of the run directory cannot be read.
        """
        remote = self.store.sizes()
        self._upload_results(remote)
        if checkpoint and self._upload_checkpoint(checkpoint, remote):
            self._delete_checkpoints(checkpoint.name, remote)

    def _upload_checkpoint(self, checkpoint: Path, remote: dict[str, int]) -> bool:
        """Copy a checkpoint unless the mirror has it; returns False if another one of this name has replaced it."""
        prefix, manifest = f"{CHECKPOINTS}/{checkpoint.name}", (checkpoint / MANIFEST).read_bytes()
        if f"{prefix}/{MANIFEST}" in remote:
            if self.store.read(f"{prefix}/{MANIFEST}") == manifest:
                return True
            self.store.delete(f"{prefix}/{MANIFEST}")
        for name in read_manifest(checkpoint):
            self.store.upload(checkpoint / name, f"{prefix}/{name}")
        if (checkpoint / MANIFEST).read_bytes() != manifest:  # After a rollback, the same step was saved again.
            return False
        self.store.upload(checkpoint / MANIFEST, f"{prefix}/{MANIFEST}")
        return True

    def _delete_checkpoints(self, newest: str, remote: dict[str, int]) -> None:
        """Delete all checkpoints but the newest ones: older ones, incomplete ones, and corrupt ones of later steps."""
        older = [name for name in _complete(remote) if name < newest]
        kept = {newest, *older[1 - self.keep :]}
        for manifest_first in (True, False):
            for name in remote:
                parent, _, file = name.rpartition("/")
                folder, _, checkpoint = parent.rpartition("/")
                is_old = folder == CHECKPOINTS and is_checkpoint_name(checkpoint) and checkpoint not in kept
                if is_old and (file == MANIFEST) == manifest_first:
                    self.store.delete(name)

    def _upload_results(self, remote: dict[str, int]) -> None:
        for name, path in self._iter_results():
            status = path.stat()
            version = status.st_size, status.st_mtime_ns
            if self._copied.get(name) == version:
                continue
            # Files of TensorBoard are only appended to, and each process has its own.
            if not (name.startswith("tensorboard/") and remote.get(name) == status.st_size):
                with self._snapshot(name, path) as source:
                    self.store.upload(source, name)
            self._copied[name] = version

    def _iter_results(self) -> Iterator[tuple[str, Path]]:
        """Yield the names and paths of the results in the run directory."""
        for name in (*_DESCRIPTION, *_RESULT_FILES, *_RESULT_DIRS):
            path = self.folder / name
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file() and not file.name.endswith(".part"):
                    yield file.relative_to(self.folder).as_posix(), file

    @contextmanager
    def _snapshot(self, name: str, path: Path) -> Iterator[Path]:
        """Yield a file with the content that a result has now, also if it grows while it is copied."""
        if not name.startswith(_GROWING):
            yield path
            return
        snapshot = self.folder / _SNAPSHOT
        try:
            yield Path(shutil.copyfile(path, snapshot))
        finally:
            snapshot.unlink(missing_ok=True)

    def _download_results(self) -> None:
        for name, size in self.store.sizes().items():
            if not _is_result(name):
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = temporary_path(path)
            try:
                self.store.download(name, part)
                if part.stat().st_size != size:
                    reason = f"{name} has {part.stat().st_size} bytes after copying, expected {size}"
                    raise StorageError(self.location, reason, "Run the same command again.", "run.mirror")
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)


def _complete(sizes: dict[str, int]) -> list[str]:
    """Return the names of the checkpoints with a manifest, oldest first."""
    paths = (name.split("/") for name in sizes)
    return sorted(
        path[1] for path in paths if path[0] == CHECKPOINTS and path[2:] == [MANIFEST] and is_checkpoint_name(path[1])
    )


def _is_result(name: str) -> bool:
    """Return whether a file of a mirror is a result of a run; names that lead out of its directory are not."""
    parts = name.split("/")
    return name in _RESULT_FILES or (
        len(parts) > 1
        and parts[0] in _RESULT_DIRS
        and not any(part in ("", ".", "..") or "\0" in part for part in parts)
    )
