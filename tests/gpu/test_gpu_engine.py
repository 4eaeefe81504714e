"""DeepSpeed on a GPU, and on the CPU of a GPU machine; the watchdog with NCCL collectives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.flight_recorder.components.loader import read_dump

from tests.conftest import make_shards
from tests.helpers.launch import ROOT, environment, losses, tiny_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("device", "reported"), [("cpu", "on cpu, ZeRO stage 0"), ("gpu", "on cuda, ZeRO stage 1")])
def test_run_uses_its_device_and_the_default_zero_stage(device: str, reported: str, tmp_path: Path):
    make_shards("synthetic", tmp_path / "set", "--train-clips=96", "--test-clips=24", "--short-side=160",
                "--codec=h264")  # fmt: skip
    config = tiny_config(tmp_path)
    overrides = f"data.root={tmp_path / 'set'}", f"run.root={tmp_path}", f"run.device={device}"
    assert f"1 rank(s) {reported}, phases" in train(config, *overrides, launcher=True)
    assert len(losses(tmp_path / "tiny")) == 20 and np.isfinite(losses(tmp_path / "tiny")).all()


def run(script: str, *arguments: object) -> str:
    """Run a script in a new process, because DeepSpeed uses one device per process; returns its output."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=180, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


STEPS = """
import warnings
import torch
from tests.helpers.engine import new_engine, step
from distav.distributed.process_group import process_group

with process_group("gpu", 60, 1) as world:
    for depth in (1, 9):
        engine = new_engine(None, "auto", depth, world)
        parameters = list(engine.model.parameters())
        assert engine.stage == 1 and all(parameter.is_cuda for parameter in parameters)
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        for _ in range(4):
            norm = step(engine)
        assert norm.is_cuda and float(norm) > 0 and not engine.skipped
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(engine)
        torch.cuda.set_sync_debug_mode("default")
        print("waits:", sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
        step(engine, float("nan"))
        assert engine.skipped
"""


def test_number_of_gpu_synchronizations_in_a_step_does_not_depend_on_the_number_of_parameters():
    few, many = [line for line in run(STEPS).splitlines() if line.startswith("waits:")]
    assert few == many, (few, many)


RESTORE = """
import torch
from tests.helpers.engine import new_engine, step
from distav.distributed.process_group import process_group

with process_group("gpu", 60, 1) as world:
    engine, restored = new_engine(None, "auto", 3, world), new_engine(None, "auto", 3, world)
    for _ in range(3):
        step(engine)
    tensors, steps = engine.state()
    assert steps == 3
    read = lambda name, start, size: tensors[f"{name}/{start}"]
    restored.restore(read, steps, ["exp_avg", "exp_avg_sq"])
    for _ in range(2):
        assert torch.equal(step(engine), step(restored))
    expected = engine.full_state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in restored.full_state_dict().items())
    (tensors, steps), (expected, _) = restored.state(), engine.state()
    assert steps == 5 and all(torch.equal(values, expected[name]) for name, values in tensors.items())
"""


def test_restored_state_continues_exactly():
    run(RESTORE)


NCCL = """
import faulthandler, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from distav.distributed.watchdog import CollectiveCounts, Watchdog
from distav.distributed.process_group import process_group

with process_group("gpu", 60, 1) as world:
    rows = torch.ones(4, device=world.device)
    dist.all_reduce(rows)
    torch.cuda.synchronize()
    time.sleep(1)
    assert not CollectiveCounts.read().in_progress
    torch.cuda._sleep(8_000_000_000)  # about 4 s
    dist.all_reduce(rows)
    time.sleep(0.5)
    before = CollectiveCounts.read()
    assert before.in_progress, before
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watchdog = Watchdog("127.0.0.1", store.port, 0, 1, 60)
    watchdog.record_dir = Path(sys.argv[1])
    watchdog._write_records()
    faulthandler.cancel_dump_traceback_later()
    torch.cuda.synchronize()
    time.sleep(1)
    assert not CollectiveCounts.read().in_progress
    group = dist.new_group([0])
    dist.all_reduce(rows, group=group)
    torch.cuda.synchronize()
    time.sleep(1)
    after = CollectiveCounts.read()
    assert after.begun == before.begun + 1 and after.finished != before.finished, (before, after)
"""


def test_watchdog_detects_a_collective_that_waits_on_the_gpu(tmp_path: Path):
    run(NCCL, tmp_path)
    entries: list = read_dump("rank_", str(tmp_path / "nccl" / "rank_0"))["entries"]  # pyright: ignore[reportAssignmentType]
    assert [entry["state"] == "completed" for entry in entries] == [True, False]
