"""Steps of the DeepSpeed engine: synchronizations, kernels, skipped steps and the timeout of its process group."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distav.config.schema import Config, Precision
from distav.distributed.process_group import World
from distav.training.engine.deepspeed_engine import Engine
from tests.helpers.engine import CPU, ChainNet, media_batch, new_engine, step
from tests.helpers.spawn import on_ranks


class ValueReads(TorchDispatchMode):
    """Counts reads of tensor values; on a GPU, each would wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_waits(depth: int) -> dict[tuple[int, str], tuple[int, int]]:
    """Return value reads and device synchronizations of a step, by stage and precision."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    synchronizations: list[None] = []
    accelerator.synchronize = lambda *_: synchronizations.append(None)
    counts = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = new_engine(stage, precision, depth)
            for _ in range(4):
                synchronizations.clear()
                with ValueReads() as reads:
                    norm = step(engine)
                assert isinstance(norm, Tensor) and norm.ndim == 0 and norm > 0 and not engine.skipped
            counts[stage, precision] = reads.count, len(synchronizations)
    return counts


def test_number_of_waits_in_a_step_does_not_depend_on_the_number_of_parameters():
    few, many = (on_ranks(1, count_waits, depth, timeout_s=120)[0] for depth in (1, 9))
    assert all(synchronizations == 0 for _, synchronizations in few.values())
    assert {key: few[key] for key in few if key[0]} == {key: many[key] for key in many if key[0]}


class Kernels(TorchDispatchMode):
    """Counts operations that compute or copy values; on a GPU, each launches kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_kernels(depth: int) -> dict[tuple[int, str], int]:
    """Return the kernels of a step in addition to those of autograd, by stage and precision."""
    counts = {}
    for stage in (1, 2):
        for precision in ("fp32", "bf16"):
            engine = new_engine(stage, precision, depth)
            for _ in range(2):
                with Kernels() as kernels:
                    step(engine)
            plain = ChainNet(depth).to(next(engine.model.parameters()).dtype)
            with Kernels() as autograd:
                plain(torch.ones(4, 5), torch.zeros(0))["logits"].float().square().mean().backward()
            counts[stage, precision] = kernels.count - autograd.count
    return counts


def test_number_of_kernels_of_an_update_hardly_depends_on_the_number_of_parameters():
    few, many = (on_ranks(1, count_kernels, depth, timeout_s=120)[0] for depth in (1, 9))
    parameters = 2 * (9 - 1)
    per_parameter = {key: (many[key] - few[key]) / parameters for key in few}
    assert all(count == 0 for (stage, _), count in per_parameter.items() if stage == 1), per_parameter
    # Each gradient is copied when it is computed, and again when it is reduced.
    assert all(count <= 2 for count in per_parameter.values()), per_parameter


def trained(world: World, stage: int, precision: str, batched: bool) -> list[Tensor]:
    """Return gradient norms and weights of an engine; one step is clipped, one is skipped.

    Args:
        world: ranks; each has its own batches.
        stage: ZeRO stage.
        precision: fp32 or bf16.
        batched: False for the operations of DeepSpeed's own optimizer.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    settings = Config()
    settings.deepspeed.zero_stage, settings.deepspeed.precision = stage, Precision[precision]
    settings.optim.global_batch, settings.optim.gradient_accumulation_steps = 4 * world.world_size, 2
    contiguous = {} if batched else {"contiguous_gradients": True}
    settings.deepspeed.extra = {"zero_optimization": {"reduce_bucket_size": 48, **contiguous}}
    engine = Engine(lambda: ChainNet(3), settings, world)
    if not batched:
        engine._optimizer.__class__ = DeepSpeedZeroOptimizer
    results = []
    for scale in (1.0, 1e4, float("inf"), 3.0):
        for micro_batch in range(2):
            frames = torch.arange(10.0).view(2, 5) + 3 * world.rank - micro_batch
            engine.backward(scale * engine(media_batch(frames=frames))["logits"].float().square().mean())
            norm = engine.step()
        results += [norm, *engine.full_state_dict().values()]
    return results


def compare_with_deepspeed() -> list[bool]:
    """Return, for each stage and precision, whether DeepSpeed's own optimizer has the same results."""
    world = World(distributed.get_rank(), distributed.get_world_size(), 0, torch.device("cpu"))
    return [
        all(
            torch.equal(values, expected)
            for values, expected in zip(
                trained(world, stage, precision, True), trained(world, stage, precision, False), strict=True
            )
        )
        for stage in (1, 2)
        for precision in ("fp32", "bf16")
    ]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_batched_operations_have_the_results_of_deepspeed(num_ranks: int):
    for equal in on_ranks(num_ranks, compare_with_deepspeed, timeout_s=120):
        assert equal == [True] * 4


def changes_and_skips() -> dict[tuple[int, str], list[bool]]:
    """Return whether the weights changed, and `skipped`, for five scales of the loss, by stage and precision."""
    results: dict[tuple[int, str], list[bool]] = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = new_engine(stage, precision, 1)
            for scale in (1.0, float("inf"), 1.0, float("nan"), 1.0):
                before = engine.full_state_dict()
                step(engine, scale)
                after = engine.full_state_dict()
                changed = any(not torch.equal(values, before[name]) for name, values in after.items())
                results.setdefault((stage, precision), []).extend([changed, engine.skipped])
    return results


def test_non_finite_step_is_skipped_at_each_stage():
    for configuration, result in on_ranks(1, changes_and_skips, timeout_s=120)[0].items():
        assert result == [True, False, False, True, True, False, False, True, True, False], configuration


def deepspeed_timeout() -> timedelta:
    engine = new_engine(1, "fp32", 1)
    return engine._engine.data_parallel_group._get_backend(torch.device("cpu")).options._timeout


def test_process_group_of_deepspeed_has_the_timeout_of_the_run():
    assert on_ranks(1, deepspeed_timeout, timeout_s=97)[0] == timedelta(seconds=97)


class TwoHeads(nn.Module):
    """A network with two heads, of which a step may use one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, frames: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        return {"first": self.first(frames), "second": self.second(frames)}


def train_one_head_after_both(stage: int) -> list[Tensor]:
    """Return gradient norms and weights of steps that use both heads, and then the first one alone."""
    settings = Config()
    settings.deepspeed.zero_stage, settings.deepspeed.precision = stage, Precision.fp32
    settings.optim.global_batch = 4
    engine = Engine(TwoHeads, settings, CPU)
    engine.set_lr(0.01, 0.01)
    results = []
    for uses_both in (True, True, False, False, True):
        outputs = engine(media_batch(frames=torch.arange(20.0).view(4, 5)))
        loss = outputs["first"].square().mean()
        engine.backward(loss + outputs["second"].square().mean() if uses_both else loss)
        results += [engine.step(), *engine.full_state_dict().values()]
    return results


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_without_a_gradient_are_treated_alike_at_each_stage(stage: int):
    reference = on_ranks(1, train_one_head_after_both, 0)[0]
    for value, expected in zip(on_ranks(1, train_one_head_after_both, stage)[0], reference, strict=True):
        torch.testing.assert_close(value, expected, check_dtype=False)
