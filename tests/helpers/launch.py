"""Start training as a user does, through the deepspeed launcher."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.rank_group import RankGroup

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


def slurm_task(rank: int, num_tasks: int) -> dict[str, str]:
    """Return the variables that `srun` sets for a task of a step of this process on one machine."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(num_tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def environment() -> dict[str, str]:
    """Return the environment of a launch: programs of this interpreter first, no choice of the accelerator."""
    ours = {"PATH": f"{DEEPSPEED.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | ours


def tiny_config(folder: Path, text: str = TINY) -> Path:
    """Write a configuration that trains in seconds, and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def command(config: Path, *overrides: str, ranks: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
    """Return the command line of a launch."""
    options = launcher or ("--num_gpus", str(ranks))
    port = str(29600 + os.getpid() % 2000)
    script = [str(ROOT / "distav" / "train.py"), "--config", str(config), *overrides]
    return [str(DEEPSPEED), *options, *([] if launcher else ["--master_port", port]), *script]


def train(
    config: Path, *overrides: str, ranks: int = 1, status: int = 0, timeout_s: float = 240, launcher: bool = False
) -> str:
    """Run a training to completion and return its output.

    Ranks are forked from a server process, which takes a second, or started by the deepspeed launcher, which takes half
    a minute. Only the latter may use a GPU.
    """
    if launcher:
        words = command(config, *overrides, ranks=ranks)
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=timeout_s, check=False)
        output, succeeded = done.stdout + done.stderr, done.returncode == 0
    else:
        assert "run.device=gpu" not in overrides, "forked ranks compute on the CPU; use launcher=True for a GPU"
        with tempfile.TemporaryDirectory() as folder:
            group = RankGroup(ranks, ["--config", str(config), *overrides], Path(folder))
            statuses = group.wait(timeout_s)
            output, succeeded = group.output(), statuses == [0] * ranks
    assert succeeded == (status == 0), output[-6000:]
    return output


def arguments(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """Arguments of train.py for a tiny run in a folder that saves after each step."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = [f"data.root={shards}", f"run.root={folder}"]
    return ["--config", str(tiny_config(folder)), *roots, *FREQUENT_SAVES, *overrides]


def losses_by_step(run: Path) -> dict[int, float]:
    """The loss of each logged step of a run."""
    logged = [(record["step"], record["train/loss"]) for record in read_metrics(run) if "train/loss" in record]
    assert len(dict(logged)) == len(logged), "a step is recorded twice"
    return dict(logged)


def losses(run: Path) -> list[float]:
    """Return the loss of every logged step of a run."""
    return [record["train/loss"] for record in read_metrics(run) if "train/loss" in record]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the content of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
