"""Saving and restoring a run, by all ranks together.

A checkpoint is a folder, `step-000000120-000-000000`: weights, optimiser state and bank rows by ranges, `state.json`,
and a manifest with size and SHA-256 of each. It is written beside the training under another name and gets its own
when all of it is on disk. It is safetensors and JSON: nothing in it can run.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distav.config.errors import UserError
from distav.data.integrity import CorruptFileError, read_manifest, verify_file
from distav.distributed.collectives import all_gather_objects, barrier, broadcast, get_rank, get_world_size
from distav.memory.bank import Bank
from distav.training.checkpoint.files import CheckpointWriter, RangeReader, bank_parts, list_checkpoints
from distav.training.engine.deepspeed_engine import Engine
from distav.training.run_state import RunState

FORMAT = 2
_WRITING, _BROKEN = ".writing-", ".broken-"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        phase: number of the phase it is in; the number of phases when all are done.
        step: optimiser steps done in that phase.
        total_steps: optimiser steps done in all phases.
        passed_over: batches of this phase's order that were left out, after spikes of the loss.
        extracted: batches of a correction whose features are there.
    """

    phase: int = 0
    step: int = 0
    total_steps: int = 0
    skipped_batches: int = 0
    extracted_batches: int = 0

    @property
    def name(self) -> str:
        """Name of the checkpoint at this place; names sort like places."""
        return f"step-{self.total_steps:09d}-{self.phase:03d}-{self.extracted_batches:06d}"


class CheckpointManager:
    """The checkpoints of one run.

    Attributes:
        write_s: seconds that the last one took to be written, beside the training.
    """

    def __init__(self, folder: Path, keep: int):
        """Take the folder that they lie in, and how many of them are kept."""
        self.folder, self.keep = folder, keep
        self.write_s = 0.0
        self._writer: CheckpointWriter | None = None
        self._not_begun: list[str] = []

    def save(self, progress: Progress, engine: Engine, bank: Bank, state: RunState) -> list[str]:
        """Copy the state and have it written while the training goes on; every rank calls this at the same step.

        Args:
            progress: phase and steps done.
            engine: weights and optimiser state; a rank writes what it holds of them.
            bank: a rank writes its own rows.
            state: stored by the main rank.

        Returns:
            Why the checkpoint before could not be written, by rank; nothing where it was.
        """
        faults = self.wait()
        part = self.folder / f"{_WRITING}{progress.name}"
        fault = broadcast(self._make(part) if get_rank() == 0 else None)
        if fault:
            self._not_begun = [fault]
            return faults
        tensors, steps = engine.state()
        kinds = sorted({name.partition("/")[0] for name in tensors} - {"weight", "buffer"})
        optimizer = {"steps": steps, "kinds": kinds}
        content = {
            "format": FORMAT,
            "progress": asdict(progress),
            "optimizer": optimizer,
            "run_state": state.to_json(),
        }
        encoded = json.dumps(content).encode() if get_rank() == 0 else None
        files = {f"engine-{get_rank():05d}.safetensors": tensors, f"bank-{get_rank():05d}.safetensors": bank.state()}
        self._writer = CheckpointWriter(part, self.folder / progress.name, files, encoded, self.keep)
        self._writer.start()
        return faults

    def wait(self) -> list[str]:
        """Return when the last checkpoint is on disk on all ranks, or why it is not, by rank."""
        if not self._writer:
            faults, self._not_begun = self._not_begun, []
            return faults
        writer, self._writer = self._writer, None
        writer.written.wait()
        faults = [each for each in all_gather_objects(writer.error) if each]
        if faults:
            writer.given_up.set()
        writer.join()
        if not faults:
            faults = [each for each in all_gather_objects(writer.error) if each]
        if faults and get_rank() == 0:
            shutil.rmtree(writer.part, ignore_errors=True)
        barrier()
        self.write_s = writer.seconds
        return faults

    def _make(self, part: Path) -> str | None:
        """Make the folder to write into; those of killed runs are taken away."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(f"{_WRITING}*"):
                shutil.rmtree(old)
            part.mkdir()
        except OSError as error:
            return f"{self.folder}: {error.strerror}"
        return None

    def restore(
        self, engine: Engine, bank: Bank, warn: Callable[[str], None], phase: int | None = None
    ) -> tuple[Progress, RunState] | None:
        """Take up the newest whole checkpoint.

        Args:
            engine, bank: what is filled.
            warn: told of checkpoints that are passed over, on the main rank.
            phase: the phase that it has to be of; None for any.

        Returns:
            Progress and state of the run; None where there is no checkpoint, or it is of another phase.

        Raises:
            UserError: where there are checkpoints and none is whole, or it is of another set or network.
        """
        faults: list[str] = []
        names: list[str] = broadcast([each.name for each in list_checkpoints(self.folder)] if get_rank() == 0 else None)
        for name in reversed(names):
            fault = self._fault(self.folder / name)
            if fault is None:
                self._set_aside_corrupt(faults, warn)
                return self._read(self.folder / name, engine, bank, phase)
            faults.append(f"{name}: {fault}")
        if faults:
            raise UserError(
                f"{self.folder}: no checkpoint is whole ({'; '.join(faults)}). Copy one back from a backup, or delete "
                "the run's folder to start afresh."
            )
        return None

    def _fault(self, folder: Path) -> str | None:
        """Return what is wrong with a checkpoint; ranks share the files, all get the same answer."""
        fault = None
        try:
            for number, (name, expected) in enumerate(sorted(read_manifest(folder).items())):
                if number % get_world_size() == get_rank():
                    verify_file(folder, name, expected)
        except CorruptFileError as error:
            fault = str(error)
        return next((each for each in all_gather_objects(fault) if each), None)

    def _set_aside_corrupt(self, faults: Sequence[str], warn: Callable[[str], None]) -> None:
        """Put damaged checkpoints aside, so that they neither count as kept ones nor are in the way."""
        for fault in faults if get_rank() == 0 else ():
            name = fault.partition(":")[0]
            aside = self.folder / f"{_BROKEN}{name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.folder / name, aside)
            warn(f"checkpoint {fault}; it is put aside as {aside.name}, and the one before is taken")
        barrier()

    def _read(self, folder: Path, engine: Engine, bank: Bank, phase: int | None) -> tuple[Progress, RunState] | None:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(
                f"{folder}: checkpoint format {state['format']}; this version of distav reads format {FORMAT}. Finish "
                "the run with the version that wrote it, or start over under another run.name."
            )
        progress = Progress(**state["progress"])
        if phase not in (None, progress.phase):
            return None
        try:
            engine.restore(RangeReader(folder).read, **state["optimizer"])
            bank.restore(bank_parts(folder))
        except ValueError as error:
            raise UserError(
                f"{folder}: {error}; it is of another set or network, start afresh under another run.name."
            ) from None
        return progress, RunState.from_json(state["run_state"])
