"""Run directory: created, or checked to belong to the same run, and locked."""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from distav.config import loading
from distav.config.errors import UserError
from distav.config.phases import PHASE_KINDS
from distav.config.schema import Config
from distav.data.files import write_atomically
from distav.distributed.collectives import barrier, broadcast, get_rank
from distav.distributed.environment import machine
from distav.distributed.process_group import World
from distav.training.checkpoint.mirror import RunMirror

LOCK_TIMEOUT_S = 10.0
"""Seconds to wait for a process that holds the lock to exit."""
RESUMABLE_CHANGES = (
    "run.root",
    "run.mirror",
    "run.device",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.max_consecutive_skipped_steps",
    "run.timeout_s",
    "run.threads_per_rank",
    "run.compile",
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
    "monitor.projector_clips",
    "monitor.trackers",
)
"""Settings that may change when a run resumes; they do not affect what is learned from finite losses."""


@contextlib.contextmanager
def lock_run_dir(folder: Path, config: Config, world: World, mirror: RunMirror | None = None) -> Iterator[None]:
    """Create the run directory, or check that it and its mirror belong to this run, and lock it; called by all ranks.

    Raises:
        UserError: on all ranks, if it or the mirror belongs to another run or cannot be written, or if it is locked by
            another process.
    """
    with contextlib.ExitStack() as stack:
        error = broadcast(_prepare(folder, config, world, mirror, stack) if get_rank() == 0 else None)
        if error:
            raise UserError(error)
        barrier()
        yield


def _prepare(
    folder: Path, config: Config, world: World, mirror: RunMirror | None, stack: contextlib.ExitStack
) -> str | None:
    """Lock the directory, write config.yaml and environment.json and copy them; returns an error message or None."""
    config_file, config_yaml = folder / "config.yaml", loading.to_yaml(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(stack.enter_context(open(folder / "lock", "a+")), folder)
        difference = _first_difference(config_file.read_text(), config_yaml) if config_file.exists() else ""
        if difference:
            return (
                f"{folder} holds a run with other settings ({difference}). Choose another run.name, or delete the "
                "directory to start over."
            )
        recorded = mirror.read_config() if mirror else None
        difference = _first_difference(recorded, config_yaml) if recorded is not None else ""
        if mirror and difference:
            return (
                f"run.mirror={mirror.location} holds a run with other settings ({difference}). Choose another run.name "
                "or run.mirror, or delete the mirror to start over."
            )
        write_atomically(config_file, config_yaml.encode())
        write_atomically(folder / "environment.json", json.dumps(_environment(world), indent=1).encode())
        if mirror:
            mirror.write_description()
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"run.root={config.run.root}: {folder} cannot be written: {error.strerror}."
    return None


def _lock(file: TextIO, folder: Path) -> None:
    """Lock the directory until this process exits; waits for another process that is about to exit.

    Raises:
        UserError: if the other process does not exit in time.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read().strip() or 'another process'} is training in this directory. Stop it, or "
                    "choose another run.name."
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _first_difference(recorded: str, requested: str) -> str:
    """Return the first setting that differs and is not resumable, with both values; empty if there is none.

    Args:
        recorded: config.yaml of the run directory. Settings that it lacks count as their defaults.
        requested: YAML of this run.
    """
    try:
        old, new = flatten_yaml(recorded), flatten_yaml(requested)
    except YAMLError:
        return "the recorded config.yaml is not valid YAML"
    defaults = default_settings(new)
    for key in dict.fromkeys([*new, *old]):
        default = defaults.get(key, "not set")
        old_value, new_value = old.get(key, default), new.get(key, default)
        if key not in RESUMABLE_CHANGES and old_value != new_value:
            return f"recorded: {key}={old_value}, requested: {key}={new_value}"
    return "" if _phase_names(old) == _phase_names(new) else "the phases have another order"


def default_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of all settings of a run with the same phases, except the kinds of its phases."""
    phases = {name: PHASE_KINDS[settings[f"phases.{name}.kind"]]() for name in _phase_names(settings)}
    defaults = flatten_yaml(loading.to_yaml(Config(phases=phases)))
    return {key: value for key, value in defaults.items() if not key.endswith(".kind")}


def _phase_names(settings: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.split(".")[1] for key in settings if key.startswith("phases.")))


def nested_settings(config: Config) -> dict[str, Any]:
    """Return all settings as nested dictionaries."""
    settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(loading.to_yaml(config))))
    return {name: section for name, section in settings.items() if name != "defaults"}


def flatten_yaml(text: str) -> dict[str, Any]:
    """Return the leaves of a YAML document by dotted key."""
    return dict(leaves(OmegaConf.to_container(OmegaConf.create(text))))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested dictionaries with their dotted keys."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _environment(world: World) -> dict[str, Any]:
    return {
        **machine(),
        "commit": _commit(),
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }


def _commit() -> str | None:
    """Return the Git commit of the source, if there is one and Git is installed."""
    try:
        words = ["git", "rev-parse", "HEAD"]
        output = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    return output.strip() or None
