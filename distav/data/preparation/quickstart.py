"""Render the synthetic dataset when a run starts, so that the first run needs no download."""

import subprocess
import sys
from pathlib import Path

from distav.config.errors import UserError
from distav.config.schema import DataConfig
from distav.data.storage.object_store import is_url
from distav.distributed.collectives import broadcast
from distav.distributed.process_group import World


def render_missing_dataset(data: DataConfig, world: World) -> None:
    """Render the synthetic dataset if `data.synthetic.enabled` and `data.root` is a directory without manifest.

    The first rank renders; all ranks wait for it.

    Raises:
        UserError: if rendering fails.
    """
    if not data.synthetic.enabled or is_url(data.root):
        return
    status = 0
    if world.is_main and not (Path(data.root) / "manifest.json").is_file():
        synthetic = data.synthetic
        options = [
            f"--train-clips={synthetic.train_clips}",
            f"--test-clips={synthetic.test_clips}",
            f"--label-noise={synthetic.label_noise}",
            f"--correspondence-noise={synthetic.correspondence_noise}",
            f"--seed={synthetic.seed}",
        ]
        print(
            f"no dataset in {data.root}; running make_shards.py synthetic {data.root} {' '.join(options)}", flush=True
        )
        # A separate process, so that its workers start without torch and DeepSpeed.
        status = subprocess.call([sys.executable, "-m", "distav.tools.make_shards", "synthetic", data.root, *options])
    if broadcast(status):
        raise UserError(f"data.root={data.root}: rendering the synthetic dataset failed; see the error above.")
