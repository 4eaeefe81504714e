"""The folder of a run: made, or seen to hold this very run."""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import OmegaConf

from distav.config import loading
from distav.config.errors import UserError
from distav.config.phases import PHASE_KINDS
from distav.config.schema import Config
from distav.data.files import write_atomically
from distav.distributed.collectives import barrier, broadcast, get_rank
from distav.distributed.process_group import World

LOCK_TIMEOUT_S = 10.0
"""How long a run that is there already may take to end."""
RESUMABLE_CHANGES = (
    "run.root",
    "run.device",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.max_consecutive_skipped_steps",
    "run.timeout_s",
    "run.threads_per_rank",
    "data.root",
    "data.cache",
    "data.cache_mib",
    "data.decode_threads",
    "data.prefetch",
    "data.max_quarantined_fraction",
    "optim.loss_spike_factor",
    "optim.loss_spike_skip_batches",
    "monitor.media_every",
    "monitor.media_clips",
)
"""Settings that may change when a run goes on: none of them has a part in what is learnt from sound numbers."""


@contextlib.contextmanager
def lock_run_dir(folder: Path, settings: Config, world: World) -> Iterator[None]:
    """Make the run's folder, or see that it holds this very run, and keep others out of it; all ranks agree.

    Raises:
        UserError: where it holds another run, another process is at it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        _claim(folder, settings, world, held)
        yield


def _claim(folder: Path, settings: Config, world: World, held: contextlib.ExitStack) -> None:
    problem = None
    if get_rank() == 0:
        stored, text = folder / "config.yaml", loading.to_yaml(settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(held.enter_context(open(folder / "lock", "a+")), folder)
            difference = _difference(stored.read_text(), text) if stored.exists() else ""
            if difference:
                problem = (
                    f"{folder} holds a run with other settings ({difference}); choose another run.name, or delete the "
                    "folder to start afresh."
                )
            else:
                write_atomically(stored, text.encode())
                write_atomically(folder / "environment.json", json.dumps(_environment(world), indent=1).encode())
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"run.root={settings.run.root}: {folder} cannot be written: {error.strerror}."
    problem = broadcast(problem)
    if problem:
        raise UserError(problem)
    barrier()


def _lock(file: TextIO, folder: Path) -> None:
    """Lock the folder as long as this process lives; a run that is about to end is waited for."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read().strip() or 'another process'} is training there; end that first, or "
                    "choose another run.name."
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _difference(before: str, now: str) -> str:
    """Return the first setting that differs and matters, as it stands there and here."""
    there, here = (dict(_flat(OmegaConf.to_container(OmegaConf.create(text)))) for text in (before, now))
    defaults = _defaults(here)
    for key in dict.fromkeys([*here, *there]):
        # A setting that is newer than the run was what it is by default.
        old, new = (each.get(key, defaults.get(key, "not set")) for each in (there, here))
        if key not in RESUMABLE_CHANGES and old != new:
            return f"there: {key}={old}, here: {key}={new}"
    return "" if list(_phases(there)) == list(_phases(here)) else "the phases stand in another order"


def _defaults(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the default of every setting of a run with these phases, but for what says which phases there are."""
    phases = {name: PHASE_KINDS[flat[f"phases.{name}.kind"]]() for name in _phases(flat)}
    defaults = dict(_flat(OmegaConf.to_container(OmegaConf.create(loading.to_yaml(Config(phases=phases))))))
    return {key: value for key, value in defaults.items() if not key.endswith(".kind")}


def _phases(flat: dict[str, Any]) -> Iterator[str]:
    yield from dict.fromkeys(key.split(".")[1] for key in flat if key.startswith("phases."))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _environment(world: World) -> dict[str, Any]:
    names = ("distav", "torch", "torchvision", "torchaudio", "deepspeed", "nvidia-dali-cuda130", "webdataset", "av")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "num_ranks": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }
