"""Training throughput beside processes that occupy the cores, with threads that wait passively and actively.

Each measurement is a short training of `configs/quickstart.yaml` by `distav/train.py` in a process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distav.config.errors import UserError
from tools.bench.timing import Results, Setting

ROOT = Path(__file__).parents[2]
POLICIES = {"passive": {}, "active": {"OMP_WAIT_POLICY": "ACTIVE"}}
"""Environment of the training by the policy of its waiting threads; that of distav is passive."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run(setting: Setting, clips: int, epochs: int) -> Results:
    """Measure the throughput with no busy process, with one, and with one for each core.

    Args:
        setting: rounds; the threads are those that a run chooses.
        clips: number of clips.
        epochs: epochs of a training.

    Raises:
        UserError: if a training fails.
    """
    cores = len(os.sched_getaffinity(0))
    loads = {"idle": 0, "one busy process": 1, "one busy process per core": cores}
    results = Results("busy", {"clips": clips, "epochs": epochs, "cores": cores, "rounds": setting.rounds})
    rates: dict[tuple[str, str], list[float]] = {(load, policy): [] for load in loads for policy in POLICIES}
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as name:
        folder = Path(name)
        for round_index in range(setting.rounds):
            for load, policy in rates:
                with _busy_processes(loads[load]):
                    rate = _train(folder, f"{round_index}-{load}-{policy}".replace(" ", "-"), policy, clips, epochs)
                rates[load, policy].append(rate)
    for (load, policy), values in rates.items():
        results.add_value(f"{load}, {policy} waiting", statistics.median(values), "clips/s")
    for load, threshold in (("one busy process", ">= 0.7"), ("one busy process per core", ">= 0.45")):
        for policy in POLICIES:
            values = (rates[load, policy], rates["idle", policy])
            results.add_ratio(f"{load} / idle, {policy} waiting", values, threshold if policy == "passive" else "")
    results.add_ratio("idle, passive / active waiting", (rates["idle", "passive"], rates["idle", "active"]), ">= 0.97")
    return results


@contextmanager
def _busy_processes(number: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _train(folder: Path, name: str, policy: str, clips: int, epochs: int) -> float:
    """Train the contrastive phase of the quickstart; returns clips per second."""
    environment = {key: value for key, value in os.environ.items() if key not in WAITING} | POLICIES[policy]
    later = ("correct_1", "learn_1", "correct_2", "learn_2", "labels")
    command = [
        sys.executable, str(ROOT / "distav" / "train.py"), "--config", str(ROOT / "configs" / "quickstart.yaml"),
        f"data.root={folder / 'shards'}", f"data.synthetic.train_clips={clips}", "data.synthetic.test_clips=24",
        f"run.root={folder / 'runs'}", f"run.name={name}", "run.device=cpu", "monitor.media_clips=0",
        f"phases.contrastive.epochs={epochs}", *(f"~phases.{phase}" for phase in later),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"busy: a training failed: {done.stderr.strip()[-500:]}")
    report = json.loads((folder / "runs" / name / "report.json").read_text())
    return float(report["phases"][0]["clips_per_s"])
