"""DeepSpeed on a GPU, and off it on a machine that has one; what the watch sees of NCCL."""

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


@pytest.mark.parametrize(("device", "told"), [("cpu", "on cpu, ZeRO stage 0"), ("gpu", "on cuda, ZeRO stage 1")])
def test_a_run_trains_on_its_device_at_that_devices_stage(device: str, told: str, tmp_path: Path):
    make_shards("synthetic", tmp_path / "set", "--train-clips=96", "--test-clips=24", "--short-side=160",
                "--codec=h264")  # fmt: skip
    config = tiny_config(tmp_path)
    said = train(config, f"data.root={tmp_path / 'set'}", f"run.root={tmp_path}", f"run.device={device}", launcher=True)
    assert f"1 rank(s) {told}, phases" in said
    assert len(losses(tmp_path / "tiny")) == 20 and np.isfinite(losses(tmp_path / "tiny")).all()


def run(script: str, *arguments: object) -> str:
    """Run a script in a process of its own, since DeepSpeed serves one device in each."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


STEPS = """
import warnings
import torch
from tests.helpers.engine import new_engine, step
from distav.distributed.process_group import process_group

with process_group("gpu", 60, 1) as world:
    for depth in (1, 9):
        engine = new_engine(None, "auto", depth, world)
        assert engine.stage == 1 and all(each.is_cuda for each in engine.model.parameters())
        assert {each.dtype for each in engine.model.parameters()} == {torch.bfloat16}
        for _ in range(4):
            norm = step(engine)
        assert norm.is_cuda and float(norm) > 0 and not engine.skipped
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step(engine)
        torch.cuda.set_sync_debug_mode("default")
        print("waits:", sum("synchronizing CUDA operation" in str(each.message) for each in waits))
        step(engine, float("nan"))
        assert engine.skipped
"""


def test_a_step_waits_for_the_gpu_as_often_for_many_parameters_as_for_few():
    few, many = [line for line in run(STEPS).splitlines() if line.startswith("waits:")]
    assert few == many, (few, many)


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
    torch.cuda._sleep(8_000_000_000)  # 4 s or so
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


def test_the_watch_sees_a_collective_that_waits_on_the_gpu_alone(tmp_path: Path):
    run(NCCL, tmp_path)
    entries: list = read_dump("rank_", str(tmp_path / "nccl" / "rank_0"))["entries"]  # pyright: ignore[reportAssignmentType]
    assert [each["state"] == "completed" for each in entries] == [True, False]
