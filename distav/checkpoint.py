"""Saving and restoring a run, by all ranks together.

A checkpoint is a folder that gets its name only when it is complete: `step-000000120/` with `state.json`, DeepSpeed's
files, and the bank's rows by id range. `latest` names the newest.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch

from distav.data.format import write_atomically
from distav.engine import Engine
from distav.errors import UserError
from distav.memory.bank import Bank
from distav.world import broadcast, num_ranks, rank, wait_for_all

_PREFIX = "step-"


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        phase: number of the phase it is in; the number of phases when all are done.
        step: optimiser steps done in that phase.
        total_steps: optimiser steps done in all phases.
        samples: samples seen.
    """

    phase: int = 0
    step: int = 0
    total_steps: int = 0
    samples: int = 0


def save(folder: Path, position: Position, engine: Engine, bank: Bank, keep: int, notes: dict) -> None:
    """Write a checkpoint; every rank calls this at the same step.

    Args:
        folder: the run's checkpoint folder.
        position: where the run stands.
        engine: weights and optimiser state.
        bank: every rank writes its own rows.
        keep: checkpoints to keep.
        notes: JSON values of the main rank that come back from `restore`.
    """
    name = f"{_PREFIX}{position.total_steps:09d}-{position.phase}"
    part = folder / f".writing-{name}"
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait_for_all()
    engine.save(part)
    safetensors.torch.save_file(bank.state(), part / f"bank-{rank():05d}.safetensors")
    wait_for_all()
    if rank() == 0:
        state = {"position": asdict(position), "num_ranks": num_ranks(), "zero_stage": engine.stage, "notes": notes}
        write_atomically(part / "state.json", json.dumps(state).encode())
        for file in part.rglob("*"):
            _sync(file)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(part, folder / name)
        _sync(folder)
        write_atomically(folder / "latest", name.encode())
        for old in sorted(folder.glob(f"{_PREFIX}*"))[:-keep]:
            shutil.rmtree(old)
    wait_for_all()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore(folder: Path, engine: Engine, bank: Bank) -> tuple[Position, dict]:
    """Take up the newest checkpoint, or start at the beginning where there is none.

    Raises:
        UserError: where it was written by another number of ranks or at another ZeRO stage.
    """
    name = broadcast(_newest(folder) if rank() == 0 else None)
    if name is None:
        return Position(), {}
    where = folder / name
    state = json.loads((where / "state.json").read_text())
    for key, now in (("num_ranks", num_ranks()), ("zero_stage", engine.stage)):
        if state[key] != now:
            raise UserError(
                f"{where} was written with {key}={state[key]}, this run has {now}; "
                f"go on with {state[key]}, or start afresh under another run.name."
            )
    engine.load(where)
    parts = [safetensors.torch.load_file(file) for file in sorted(where.glob("bank-*.safetensors"))]
    try:
        bank.restore(parts)
    except ValueError as error:
        raise UserError(f"{where}: {error}; start afresh under another run.name.") from None
    return Position(**state["position"]), state["notes"]


def _newest(folder: Path) -> str | None:
    """Return the name of the newest complete checkpoint."""
    pointer = folder / "latest"
    if pointer.is_file() and (folder / pointer.read_text() / "state.json").is_file():
        return pointer.read_text()
    complete = sorted(each.parent.name for each in folder.glob(f"{_PREFIX}*/state.json"))
    return complete[-1] if complete else None
