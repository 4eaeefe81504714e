"""Shards that a run renders for itself, so that the first one needs no download."""

import subprocess
import sys
from pathlib import Path

from distav.config.errors import UserError
from distav.config.schema import DataConfig
from distav.data.storage.object_store import is_url
from distav.distributed.collectives import broadcast
from distav.distributed.process_group import World


def render_missing_dataset(data: DataConfig, world: World) -> None:
    """Render the synthetic set where `data.synthetic.enabled` and the folder, no URL, holds none; all ranks wait for it.

    Raises:
        UserError: where it could not be made.
    """
    if not data.synthetic.enabled or is_url(data.root):
        return
    status = 0
    if world.is_main and not (Path(data.root) / "manifest.json").is_file():
        make = data.synthetic
        options = [
            f"--train-clips={make.train_clips}",
            f"--test-clips={make.test_clips}",
            f"--label-noise={make.label_noise}",
            f"--correspondence-noise={make.correspondence_noise}",
            f"--seed={make.seed}",
        ]
        print(f"{data.root} holds no shards yet: make_shards.py synthetic {data.root} {' '.join(options)}", flush=True)
        # A process of its own, so that its workers start without torch and DeepSpeed.
        status = subprocess.call([sys.executable, "-m", "distav.tools.make_shards", "synthetic", data.root, *options])
    if broadcast(status):
        raise UserError(f"the shards in data.root={data.root} could not be made; the reason stands above.")
