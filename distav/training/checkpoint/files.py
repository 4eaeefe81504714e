"""The files of a checkpoint: written by each rank for itself, read by ranges by any number of ranks."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distav.data.files import write_atomically
from distav.data.integrity import file_entry, sync, write_manifest
from distav.distributed.collectives import get_rank, get_world_size

_NAME = re.compile(r"step-\d{9}-\d{3}-\d{6}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that were given their names, the oldest first."""
    return sorted(each for each in folder.glob("step-*") if _NAME.fullmatch(each.name))


class CheckpointWriter(threading.Thread):
    """Writes one rank's files; on the main rank also waits for those of the others, and gives the whole its name."""

    def __init__(
        self, part: Path, whole: Path, files: dict[str, dict[str, Tensor]], state: bytes | None, keep: int
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.part, self.whole, self.files, self.state, self.keep = part, whole, files, state, keep
        self.written, self.given_up = threading.Event(), threading.Event()
        self.error: str | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """Write, and note what went wrong."""
        began = time.monotonic()
        try:
            self._write()
            self.written.set()
            if get_rank() == 0:
                self._publish()
        except Exception as error:  # noqa: BLE001  # told at the next checkpoint, by whoever waits
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.error = f"rank {get_rank()}, {self.part}: {reason}"
        finally:
            self.seconds = time.monotonic() - began
            self.files.clear()
            self.written.set()

    def _write(self) -> None:
        for name, tensors in self.files.items():
            safetensors.torch.save_file(tensors, self.part / name)
        if self.state is not None:
            (self.part / "state.json").write_bytes(self.state)
        names = [*self.files, *(["state.json"] if self.state is not None else [])]
        found = {name: file_entry(self.part / name) for name in names}
        write_atomically(self.part / _done(get_rank()), json.dumps(found).encode())

    def _publish(self) -> None:
        files: dict[str, Any] = {}
        for each in range(get_world_size()):
            path = self.part / _done(each)
            while not path.exists():
                if self.given_up.wait(0.02):
                    return
            files |= json.loads(path.read_text())
            path.unlink()
        write_manifest(self.part, files)
        if self.whole.exists():  # A run that was rolled back comes by here again.
            os.replace(self.whole, self.part / ".before")
        os.replace(self.part, self.whole)
        shutil.rmtree(self.whole / ".before", ignore_errors=True)
        sync(self.whole.parent)
        for each in list_checkpoints(self.whole.parent)[: -self.keep]:
            shutil.rmtree(each, ignore_errors=True)


def _done(of: int) -> str:
    return f"rank-{of:05d}.json"


class RangeReader:
    """Reads ranges of flattened parameters out of the files of all ranks, a rank's own first."""

    def __init__(self, folder: Path):
        own = folder / f"engine-{get_rank():05d}.safetensors"
        files = sorted(folder.glob("engine-*.safetensors"))
        self._files: Iterator[Path] = iter(sorted(files, key=lambda each: each != own))
        self._places: dict[str, list[tuple[int, int, Any, str]]] = {}

    def _open(self) -> bool:
        path = next(self._files, None)
        if path is None:
            return False
        file = safetensors.safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118  # no dict
            name, _, start = key.rpartition("/")
            size = file.get_slice(key).get_shape()[0]
            self._places.setdefault(name, []).append((int(start), size, file, key))
        return True

    def read(self, name: str, start: int, size: int) -> Tensor:
        """Return elements [start, start + size) of a flattened tensor.

        Raises:
            ValueError: where no file has them.
        """
        found: Tensor | None = None
        missing = torch.ones(size, dtype=torch.bool)
        seen = 0
        while missing.any():
            places = self._places.get(name, [])
            for begin, count, file, key in places[seen:]:
                low, high = max(start, begin), min(start + size, begin + count)
                if low < high:
                    values = file.get_slice(key)[low - begin : high - begin]
                    found = torch.empty(size, dtype=values.dtype) if found is None else found
                    found[low - start : high - start] = values
                    missing[low - start : high - start] = False
            seen = len(places)
            if missing.any() and not self._open():
                raise ValueError(f"it lacks {int(missing.sum())} of {size} values of {name}")
        return torch.empty(0) if found is None else found


def bank_parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the saved bank rows of each rank, a rank's own first."""
    own = folder / f"bank-{get_rank():05d}.safetensors"
    for path in sorted(folder.glob("bank-*.safetensors"), key=lambda each: each != own):
        yield safetensors.torch.load_file(path)
