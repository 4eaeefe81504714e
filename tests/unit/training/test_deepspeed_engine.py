"""What a step asks of the device, and what DeepSpeed is given."""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distav.config.schema import Config, Precision
from distav.data.pipeline.loader import Batch
from distav.distributed.process_group import World
from distav.training.engine.deepspeed_engine import Engine
from tests.helpers.spawn import on_ranks

CPU = World(0, 1, 0, torch.device("cpu"))


class Net(nn.Module):
    """A chain of layers, as many as wanted."""

    def __init__(self, depth: int):
        super().__init__()
        self.visual = nn.Sequential(*[nn.Linear(5, 5) for _ in range(depth)])
        self.visual.lr_group = "towers"
        self.classify = nn.Linear(5, 3)

    def forward(self, frames: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classify(self.visual(frames.to(self.classify.weight.dtype)))}


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors, for each of which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def new_engine(stage: int | None, precision: str, depth: int, world: World = CPU) -> Engine:
    settings = Config()
    settings.deepspeed.zero_stage, settings.deepspeed.precision = stage, Precision[precision]
    settings.optim.global_batch = 4
    return Engine(lambda: Net(depth), settings, world)


def step(engine: Engine, scale: float = 1.0) -> Tensor:
    none = torch.zeros(0, dtype=torch.int64)
    frames = torch.ones(4, 5, device=next(engine.model.parameters()).device)
    out = engine(Batch(none, none.bool(), none, {"frames": frames}))
    engine.backward(scale * out["logits"].float().square().mean())
    return engine.step()


def count_waits(depth: int) -> dict[tuple[int, str], tuple[int, int]]:
    """Return by stage and precision the values read in a step and the synchronizations of the whole device."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    waits: list[None] = []
    accelerator.synchronize = lambda *_: waits.append(None)
    found = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = new_engine(stage, precision, depth)
            for _ in range(4):
                waits.clear()
                with Reads() as reads:
                    norm = step(engine)
                assert isinstance(norm, Tensor) and norm.ndim == 0 and norm > 0 and not engine.skipped
            found[stage, precision] = reads.count, len(waits)
    return found


def test_a_step_waits_for_the_device_as_often_for_many_parameters_as_for_few():
    few, many = (on_ranks(1, count_waits, depth, timeout_s=120)[0] for depth in (1, 9))
    assert all(waits == 0 for _, waits in few.values())
    assert {key: few[key] for key in few if key[0]} == {key: many[key] for key in many if key[0]}


def skips() -> dict[tuple[int, str], list[bool]]:
    """Return by stage and precision whether the weights changed in a step, and `skipped`, for some scales of loss."""
    found = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = new_engine(stage, precision, 1)
            for scale in (1.0, float("inf"), 1.0, float("nan"), 1.0):
                before = engine.full_state_dict()
                step(engine, scale)
                changed = any(not torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())
                found.setdefault((stage, precision), []).extend([changed, engine.skipped])
    return found


def test_a_step_that_is_not_finite_is_skipped_at_every_stage():
    for where, found in on_ranks(1, skips, timeout_s=120)[0].items():
        assert found == [True, False, False, True, True, False, False, True, True, False], where


def deepspeeds_timeout() -> timedelta:
    engine = new_engine(1, "fp32", 1)
    return engine._engine.data_parallel_group._get_backend(torch.device("cpu")).options._timeout


def test_deepspeeds_own_group_has_the_timeout_of_the_run():
    assert on_ranks(1, deepspeeds_timeout, timeout_s=97)[0] == timedelta(seconds=97)
