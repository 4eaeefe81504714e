"""Steps of the DeepSpeed engine: synchronizations, skipped steps and the timeout of its process group."""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.engine import new_engine, step
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
