"""DeepSpeed uses the device of the run, also on a host with a GPU."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from distav.config.errors import UserError
from distav.config.schema import Config, Precision
from distav.distributed.process_group import World
from distav.training.engine.deepspeed_engine import Engine, deepspeed_config
from tests.helpers.engine import CPU
from tests.helpers.launch import environment
from tests.helpers.spawn import on_ranks

GPU_HOST = """
from unittest import mock

gpu_host = mock.patch.multiple("torch.cuda", is_available=lambda: True, device_count=lambda: 1)
"""
IMPORTED_BEFORE = """
with gpu_host:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    assert get_accelerator().device_name() == "cuda"
"""
TRAINS = """
import os
import torch
from torch import nn
from distav.data.pipeline.loader import Batch
from distav.training.engine.deepspeed_engine import Engine
from distav.config.schema import Config, Device
from distav.distributed.process_group import process_group

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(5, 3)

    def forward(self, frames, seeds):
        return {"logits": self.classify(frames)}

settings = Config()
settings.run.device, settings.optim.global_batch = Device.cpu, 4
with process_group("cpu", 60, 1) as world:
    with gpu_host:
        engine = Engine(Net, settings, world)
    none = torch.zeros(0, dtype=torch.int64)
    before = engine.model.classify.weight.detach().clone()
    outputs = engine(Batch(none, none.bool(), {}, none, {"frames": torch.ones(4, 5)}))
    engine.backward(outputs["logits"].square().mean())
    assert engine.step() > 0 and not engine.skipped and engine.stage == 0
    assert engine.model.classify.weight.device.type == "cpu" and not torch.equal(engine.model.classify.weight, before)
from deepspeed.accelerator import get_accelerator
print("accelerator:", get_accelerator().device_name(), os.environ["DS_ACCELERATOR"])
"""


@pytest.mark.parametrize("prelude", ["", IMPORTED_BEFORE], ids=["not imported", "imported before"])
def test_cpu_run_on_a_gpu_host_trains_on_the_cpu(prelude: str):
    command = [sys.executable, "-c", GPU_HOST + prelude + TRAINS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accelerator: cpu cpu" in done.stdout


def test_contradicting_ds_accelerator_is_rejected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="DS_ACCELERATOR=cuda contradicts run.device=auto: this run computes on cpu"):
        Engine(lambda: nn.Linear(1, 1), Config(), CPU)


def selected_accelerator() -> tuple[str, str]:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return os.environ["DS_ACCELERATOR"], accelerator.device_name()


def test_forked_ranks_use_the_cpu():
    assert on_ranks(1, selected_accelerator)[0] == ("cpu", "cpu")


def test_default_zero_stage_depends_on_the_device():
    on_gpu = World(0, 1, 0, torch.device("cuda"))
    settings = Config()
    for world, stage in ((CPU, 0), (on_gpu, 1)):
        assert deepspeed_config(settings, world)["zero_optimization"]["stage"] == stage
    settings.deepspeed.precision = Precision.fp32
    assert deepspeed_config(settings, on_gpu)["zero_optimization"]["stage"] == 1
    for stage in range(4):
        settings.deepspeed.zero_stage = stage
        for world in (CPU, on_gpu):
            assert deepspeed_config(settings, world)["zero_optimization"]["stage"] == stage
