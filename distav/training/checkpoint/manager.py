"""Saving and restoring of a run by all ranks together.

A checkpoint is a directory such as `step-000000120-000-000000`. It contains ranges of the weights, the optimizer state
and the memory bank as safetensors, `state.json`, and a manifest with the size and SHA-256 of each file. It is written
in the background under a temporary name and renamed when it is complete; then it is copied to the mirror of the run,
if there is one. Nothing in it can execute code.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from distav.config.errors import UserError
from distav.data.integrity import CorruptFileError, read_manifest, verify_file
from distav.distributed.collectives import (
    all_gather_objects,
    barrier,
    broadcast,
    call_on_main_rank,
    get_rank,
    get_world_size,
    run_on_main_rank,
)
from distav.memory.bank import Bank
from distav.training.checkpoint.files import (
    CheckpointWriter,
    RangeReader,
    delete_old_checkpoints,
    iter_bank_shards,
    list_checkpoints,
)
from distav.training.checkpoint.mirror import RunMirror
from distav.training.checkpoint.mirror_uploader import MirrorUploader
from distav.training.engine.deepspeed_engine import Engine
from distav.training.run_state import Progress, RunState

FORMAT = 7
"""Version of the names in state.json and in the safetensors files."""

_INCOMPLETE_PREFIX, _CORRUPT_PREFIX = ".writing-", ".broken-"
_ADVICE = "free disk space or fix the directory permissions, then rerun the same command"


class CheckpointManager:
    """Checkpoints of one run.

    Attributes:
        write_s: seconds that writing the last checkpoint took in the background.
        downloaded: name of the checkpoint that was restored from the mirror; empty if none was.
    """

    def __init__(self, folder: Path, keep: int, mirror: RunMirror | None = None):
        """Manage the checkpoints in a directory; the newest `keep` are kept there and in the mirror of the run."""
        self.folder, self.keep, self.mirror = folder, keep, mirror
        self.write_s, self.downloaded = 0.0, ""
        self._uploader = MirrorUploader(mirror, folder) if mirror and get_rank() == 0 else None
        self._writer: CheckpointWriter | None = None
        self._start_errors: list[str] = []

    def save(self, progress: Progress, engine: Engine, bank: Bank, state: RunState) -> list[str]:
        """Copy the state and start writing it in the background; all ranks call this at the same step.

        Args:
            progress: phase and steps done.
            engine: network and optimizer; each rank writes the ranges that it holds.
            bank: memory bank; each rank writes its own rows.
            state: state of the run; written by the main rank.

        Returns:
            Errors of the previous checkpoint, one per rank that failed to write it.
        """
        errors = self.wait()
        incomplete = self.folder / f"{_INCOMPLETE_PREFIX}{progress.name}"
        start_error = broadcast(self._create(incomplete) if get_rank() == 0 else None)
        if start_error:
            self._start_errors = [start_error]
            return errors
        tensors, optimizer_steps = engine.state()
        optimizer_tensors = sorted({name.partition("/")[0] for name in tensors} - {"weight", "buffer"})
        content = {
            "format": FORMAT,
            "progress": asdict(progress),
            "optimizer": {"steps": optimizer_steps, "names": optimizer_tensors},
            "run_state": state.to_json(),
        }
        encoded = json.dumps(content).encode() if get_rank() == 0 else None
        files = {f"engine-{get_rank():05d}.safetensors": tensors, f"bank-{get_rank():05d}.safetensors": bank.state()}
        self._writer = CheckpointWriter(incomplete, self.folder / progress.name, files, encoded, self._publish)
        self._writer.start()
        return errors

    def _publish(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint to the mirror and delete old ones; the main rank calls it in its writer."""
        if self._uploader:
            self._uploader.queue(checkpoint)
            if not self._uploader.ident:
                self._uploader.start()
        delete_old_checkpoints(self.folder, self.keep, self._uploader.in_use() if self._uploader else ())

    def take_upload_error(self) -> str:
        """Return why the last copy to the mirror failed; empty if it did not, and on all ranks but the main one."""
        return self._uploader.take_error() if self._uploader else ""

    def finish_uploading(self) -> None:
        """Wait until the newest checkpoint and the results of the run are in its mirror; all ranks call this.

        Raises:
            UserError: if they cannot be copied.
        """
        if self.mirror:
            call_on_main_rank(lambda: self._uploader and self._uploader.finish(), "run the same command again")
            if self._uploader:
                delete_old_checkpoints(self.folder, self.keep)

    def wait(self) -> list[str]:
        """Wait until the last checkpoint is complete on all ranks; returns one error per rank that failed."""
        if not self._writer:
            errors, self._start_errors = self._start_errors, []
            return errors
        writer, self._writer = self._writer, None
        writer.written.wait()
        errors = _gather_errors(writer.error)
        if errors:
            writer.canceled.set()
        writer.join()
        if not errors:
            errors = _gather_errors(writer.error)
        if errors and get_rank() == 0:
            shutil.rmtree(writer.incomplete, ignore_errors=True)
        barrier()
        self.write_s = writer.seconds
        return errors

    def _create(self, incomplete: Path) -> str | None:
        """Create the directory to write into and delete those of interrupted saves; returns an error message."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{_INCOMPLETE_PREFIX}*"):
                shutil.rmtree(leftover)
            incomplete.mkdir()
        except OSError as error:
            return f"{self.folder}: {error.strerror}"
        return None

    def restore(
        self, engine: Engine, bank: Bank, warn: Callable[[str], None], phase: int | None = None
    ) -> tuple[Progress, RunState] | None:
        """Restore the newest valid checkpoint of the directory and, at the start of a run, its mirror.

        All ranks call this. If a checkpoint of the mirror is newer, or those of the directory are corrupt or missing,
        it is copied to the directory with the results of the run.

        Args:
            engine, bank: receive the saved state.
            warn: logs corrupt checkpoints; called on the main rank.
            phase: number of the phase that the checkpoint must belong to, in the directory alone; None for any.

        Returns:
            Progress and state of the run; None if there is no checkpoint, or the newest one is of another phase.

        Raises:
            UserError: if no checkpoint is valid, or it has another format or belongs to another dataset or network, or
                the mirror cannot be read.
        """
        errors: list[str] = []
        mirror_errors: list[str] = []
        mirror = self.mirror if phase is None else None
        names = broadcast([path.name for path in list_checkpoints(self.folder)] if get_rank() == 0 else None)
        mirrored = call_on_main_rank(mirror.list_checkpoints, _ADVICE) if mirror else []
        for name in sorted({*names, *mirrored}, reverse=True):
            error = self.verify(self.folder / name) if name in names else "not in the run directory"
            if error is not None and name in names:
                errors.append(f"{name}: {error}")
            if mirror and error is not None and name in mirrored:
                error = self._download(mirror, name, errors, warn)
                mirror_errors += [] if error is None else [f"{name}: {error}"]
            if error is None:
                self._set_aside_corrupt(errors, warn, "the previous checkpoint")
                return self._load(self.folder / name, engine, bank, phase)
        if errors or mirror_errors:
            places = [(self.folder, errors), (mirror and mirror.location, mirror_errors)]
            found = "; in ".join(f"{place} ({'; '.join(faults)})" for place, faults in places if faults)
            raise UserError(
                f"No valid checkpoint in {found}. Restore one from a backup, or delete the run directory"
                f"{' and its mirror' if mirror else ''} to start over."
            )
        return None

    def _download(self, mirror: RunMirror, name: str, errors: list[str], warn: Callable[[str], None]) -> str | None:
        """Copy a checkpoint and the results from the mirror; returns why the checkpoint is corrupt, or None.

        Corrupt checkpoints of the directory, whose errors are given, are set aside before.
        """
        incomplete = self.folder / f"{_INCOMPLETE_PREFIX}{name}"
        error = call_on_main_rank(lambda: mirror.download(name, incomplete), _ADVICE)
        if error is not None:
            if get_rank() == 0:
                warn(f"{mirror.location}: checkpoint {name}: {error}; using the previous checkpoint")
            return error
        self._set_aside_corrupt(errors, warn, "the mirror")
        errors.clear()
        run_on_main_rank(lambda: os.replace(incomplete, self.folder / name), _ADVICE)
        self.downloaded = name
        return None

    def verify(self, folder: Path) -> str | None:
        """Return why a checkpoint is corrupt, or None if it is valid; ranks share the files."""
        error = None
        try:
            for position, (name, expected) in enumerate(sorted(read_manifest(folder).items())):
                if position % get_world_size() == get_rank():
                    verify_file(folder, name, expected)
        except CorruptFileError as corrupt:
            error = str(corrupt)
        errors = _gather_errors(error)
        return errors[0] if errors else None

    def _set_aside_corrupt(self, errors: Sequence[str], warn: Callable[[str], None], replacement: str) -> None:
        """Rename corrupt checkpoints, so that they do not count as kept ones."""
        for error in errors if get_rank() == 0 else ():
            name = error.partition(":")[0]
            target = self.folder / f"{_CORRUPT_PREFIX}{name}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(self.folder / name, target)
            warn(f"checkpoint {error}; renamed to {target.name}, using {replacement}")
        barrier()

    def _load(self, folder: Path, engine: Engine, bank: Bank, phase: int | None) -> tuple[Progress, RunState] | None:
        content = json.loads((folder / "state.json").read_text())
        if content["format"] != FORMAT:
            raise UserError(
                f"{folder}: checkpoint format {content['format']}; this version of distav reads format {FORMAT}. "
                "Finish the run with the version that wrote it, or start a new run under another run.name."
            )
        progress = Progress(**content["progress"])
        if phase not in (None, progress.phase):
            return None
        try:
            engine.restore(RangeReader(folder).read, **content["optimizer"])
            bank.restore(iter_bank_shards(folder))
        except ValueError as error:
            raise UserError(
                f"{folder}: {error}. It belongs to another dataset or network; start a new run under another run.name."
            ) from None
        return progress, RunState.from_json(content["run_state"])


def _gather_errors(error: str | None) -> list[str]:
    return [rank_error for rank_error in all_gather_objects(error) if rank_error]
