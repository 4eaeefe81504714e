"""Start training as a user would, through the deepspeed launcher."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.team import Team

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
TINY = """defaults: [schema, _self_]
run: {name: tiny, device: cpu, log_every: 1, checkpoint_every: 100}
data: {num_frames: 2, frame_stride: 2, frame_size: 16, audio_s: 0.5}
model: {embed_dim: 16, hidden_dim: 32, visual: {width: 8}, audio: {width: 8, num_mels: 32}}
optim: {global_batch: 24}
monitor: {media_every: 10, media_clips: 2}
phases:
  contrastive: {kind: contrastive, epochs: 3}
  correction: {kind: label_correction, num_neighbors: [6, 12], second_round_neighbors: [0, 6]}
  hybrid: {kind: supervised, epochs: 2, instance_weight: 0.1}
"""


FREQUENT_SAVES = ("run.checkpoint_every=1", "run.timeout_s=6", "run.device=cpu", "monitor.media_clips=0")


def environment() -> dict[str, str]:
    """The environment of a launch: our interpreter's tools first, and the accelerator that the run chooses."""
    ours = {"PATH": f"{DEEPSPEED.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | ours


def tiny_config(folder: Path, text: str = TINY) -> Path:
    """Write a configuration that trains in seconds."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def command(config: Path, *overrides: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of a launch."""
    options = launcher or ("--num_gpus", str(ranks))
    port = str(29600 + os.getpid() % 2000)
    script = [str(ROOT / "distav" / "train.py"), "--config", str(config), *overrides]
    return [str(DEEPSPEED), *options, *([] if launcher else ["--master_port", port]), *script]


def train(
    config: Path, *overrides: str, ranks: int = 1, status: int = 0, timeout_s: float = 240, launcher: bool = False
) -> str:
    """Run a training to its end and return what it printed.

    Ranks are forked from one warm process, which takes a second, or started by the deepspeed launcher, which takes
    half a minute. Only the latter may use a GPU.
    """
    if launcher:
        words = command(config, *overrides, ranks=ranks)
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=timeout_s, check=False)
        said, good = done.stdout + done.stderr, done.returncode == 0
    else:
        assert "run.device=gpu" not in overrides, "forked ranks compute on the CPU; give launcher=True for a GPU"
        with tempfile.TemporaryDirectory() as folder:
            team = Team(ranks, ["--config", str(config), *overrides], Path(folder))
            statuses = team.end(timeout_s)
            said, good = team.said(), statuses == [0] * ranks
    assert good == (status == 0), said[-6000:]
    return said


def arguments(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """Arguments of train.py for a tiny run in a folder that saves after each step."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = [f"data.root={shards}", f"run.root={folder}"]
    return ["--config", str(tiny_config(folder)), *roots, *FREQUENT_SAVES, *overrides]


def losses_by_step(run: Path) -> dict[int, float]:
    """The loss of each logged step of a run; of a step that was repeated, the last one."""
    return {record["step"]: record["train/loss"] for record in records(run) if "train/loss" in record}


def losses(run: Path) -> list[float]:
    """The loss of every logged step of a run."""
    return [each["train/loss"] for each in records(run) if "train/loss" in each]


def records(run: Path) -> list[dict[str, Any]]:
    """What a run wrote to metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
