"""The folder of a run: made, or seen to hold this very run."""

import json
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from distav import config
from distav.data.format import write_atomically
from distav.errors import UserError
from distav.settings import Settings
from distav.world import World, broadcast, rank, wait_for_all

FREE = (
    "run.root",
    "run.device",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.max_skipped_steps",
    "run.timeout_s",
    "run.threads_per_rank",
    "data.root",
    "data.decode_threads",
    "data.prefetch",
    "data.max_bad_fraction",
    "optim.spike_factor",
    "optim.spike_skip",
    "monitor.media_every",
    "monitor.media_clips",
)
"""Settings that may change when a run goes on: none of them has a part in what is learnt from sound numbers."""


def claim(folder: Path, settings: Settings, world: World) -> None:
    """Make the run's folder, or see that it holds this very run; all ranks agree.

    Raises:
        UserError: where it holds another run, or cannot be written.
    """
    problem = None
    if rank() == 0:
        stored, text = folder / "config.yaml", config.to_yaml(settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            difference = _difference(stored.read_text(), text) if stored.exists() else ""
            if difference:
                problem = (
                    f"{folder} holds a run with other settings ({difference}); choose another run.name, or delete the "
                    "folder to start afresh."
                )
            else:
                write_atomically(stored, text.encode())
                write_atomically(folder / "environment.json", json.dumps(_environment(world), indent=1).encode())
        except OSError as error:
            problem = f"run.root={settings.run.root}: {folder} cannot be written: {error.strerror}."
    problem = broadcast(problem)
    if problem:
        raise UserError(problem)
    wait_for_all()


def _difference(before: str, now: str) -> str:
    """Return the first setting that differs and matters, as it stands there and here."""
    there, here = (dict(_flat(OmegaConf.to_container(OmegaConf.create(text)))) for text in (before, now))
    for key in dict.fromkeys([*here, *there]):
        if key not in FREE and there.get(key) != here.get(key):
            return f"there: {key}={there.get(key, 'not set')}, here: {key}={here.get(key, 'not set')}"
    return "" if list(_phases(there)) == list(_phases(here)) else "the phases stand in another order"


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
        "num_ranks": world.num_ranks,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }
