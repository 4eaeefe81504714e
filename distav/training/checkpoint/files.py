"""Files of a checkpoint: each rank writes its own; any number of ranks reads them by ranges."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distav.data.files import write_atomically
from distav.data.integrity import file_entry, sync, write_manifest
from distav.distributed.collectives import get_rank, get_world_size

_NAME = re.compile(r"step-\d{9}-\d{3}-\d{6}")
_STATE, _REPLACED = "state.json", ".before"
_POLL_S = 0.02


def is_checkpoint_name(name: str) -> bool:
    """Return whether a directory of this name is a complete checkpoint."""
    return bool(_NAME.fullmatch(name))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, oldest first."""
    return sorted(path for path in folder.glob("step-*") if is_checkpoint_name(path.name))


def delete_old_checkpoints(folder: Path, keep: int, in_use: Collection[Path] = ()) -> None:
    """Delete all complete checkpoints in a directory except the newest `keep` and those in use."""
    for old in list_checkpoints(folder)[:-keep]:
        if old not in in_use:
            shutil.rmtree(old, ignore_errors=True)


class CheckpointWriter(threading.Thread):
    """Background thread that writes the files of this rank; on the main rank it also completes the checkpoint.

    Attributes:
        incomplete: directory that all ranks write into.
        written: set when the files of this rank are written, or failed to be.
        canceled: set by the caller if another rank failed; the main rank then stops waiting for its files.
        error: reason of a failure; None without one.
        seconds: time the thread ran.
    """

    def __init__(
        self,
        incomplete: Path,
        complete: Path,
        files: dict[str, dict[str, Tensor]],
        state: bytes | None,
        on_complete: Callable[[Path], None],
    ) -> None:
        """Prepare to write a checkpoint.

        Args:
            incomplete: directory to write into.
            complete: path of the complete checkpoint.
            files: tensors by name, by name of the safetensors file.
            state: content of state.json; None on all ranks except the main one.
            on_complete: called on the main rank with the path of the complete checkpoint, in this thread.
        """
        super().__init__(name="checkpoint", daemon=True)
        self.incomplete, self.complete = incomplete, complete
        self.files, self.state, self.on_complete = files, state, on_complete
        self.written, self.canceled = threading.Event(), threading.Event()
        self.error: str | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """Write the files; an exception is stored in `error`."""
        started = time.monotonic()
        try:
            self._write()
            self.written.set()
            if get_rank() == 0:
                self._complete()
        except Exception as error:  # noqa: BLE001  # Reported by `CheckpointManager.wait`.
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.error = f"rank {get_rank()}, {self.incomplete}: {reason}"
        finally:
            self.seconds = time.monotonic() - started
            self.files.clear()
            self.written.set()

    def _write(self) -> None:
        names = list(self.files)
        for name, tensors in self.files.items():
            safetensors.torch.save_file(tensors, self.incomplete / name)
        if self.state is not None:
            (self.incomplete / _STATE).write_bytes(self.state)
            names.append(_STATE)
        entries = {name: file_entry(self.incomplete / name) for name in names}
        write_atomically(self.incomplete / _entries_file(get_rank()), json.dumps(entries).encode())

    def _complete(self) -> None:
        """Wait for the files of all ranks, write the manifest and rename the directory."""
        entries: dict[str, Any] = {}
        for rank in range(get_world_size()):
            path = self.incomplete / _entries_file(rank)
            while not path.exists():
                if self.canceled.wait(_POLL_S):
                    return
            entries |= json.loads(path.read_text())
            path.unlink()
        write_manifest(self.incomplete, entries)
        if self.complete.exists():  # After a rollback, the same step is saved again.
            os.replace(self.complete, self.incomplete / _REPLACED)
        os.replace(self.incomplete, self.complete)
        shutil.rmtree(self.complete / _REPLACED, ignore_errors=True)
        sync(self.complete.parent)
        self.on_complete(self.complete)


def _entries_file(rank: int) -> str:
    """Name of the file with a rank's manifest entries, written after its other files."""
    return f"rank-{rank:05d}.json"


class RangeReader:
    """Reads ranges of flattened tensors from the engine files of all ranks, opening this rank's own file first."""

    def __init__(self, folder: Path):
        self._unopened = iter(_own_first(folder, "engine"))
        self._ranges: dict[str, list[tuple[int, int, Any, str]]] = {}
        """Start, size, open file and key of each stored range, by name of the tensor."""

    def _open_next(self) -> bool:
        path = next(self._unopened, None)
        if path is None:
            return False
        file = safetensors.safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118  # not a dict
            name, _, start = key.rpartition("/")
            size = file.get_slice(key).get_shape()[0]
            self._ranges.setdefault(name, []).append((int(start), size, file, key))
        return True

    def read(self, name: str, start: int, size: int) -> Tensor:
        """Return elements [start, start + size) of a flattened tensor.

        Raises:
            ValueError: if the files lack some of them.
        """
        result: Tensor | None = None
        missing = torch.ones(size, dtype=torch.bool)
        num_read = 0
        while missing.any():
            ranges = self._ranges.get(name, [])
            for range_start, range_size, file, key in ranges[num_read:]:
                low, high = max(start, range_start), min(start + size, range_start + range_size)
                if low < high:
                    values = file.get_slice(key)[low - range_start : high - range_start]
                    result = torch.empty(size, dtype=values.dtype) if result is None else result
                    result[low - start : high - start] = values
                    missing[low - start : high - start] = False
            num_read = len(ranges)
            if missing.any() and not self._open_next():
                raise ValueError(f"{int(missing.sum())} of {size} values of {name} are missing")
        return torch.empty(0) if result is None else result


def iter_bank_shards(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the saved bank rows of each rank, this rank's own first."""
    for path in _own_first(folder, "bank"):
        yield safetensors.torch.load_file(path)


def _own_first(folder: Path, prefix: str) -> list[Path]:
    own = folder / f"{prefix}-{get_rank():05d}.safetensors"
    return sorted(sorted(folder.glob(f"{prefix}-*.safetensors")), key=lambda path: path != own)
