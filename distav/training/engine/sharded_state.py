"""Weights and optimizer state as ranges of flattened parameters, independent of DeepSpeed's memory layout.

Each rank saves the ranges that it holds. On restore, it reads its ranges from files that any number of ranks saved at
any ZeRO stage.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distav.distributed.collectives import get_rank, get_world_size
from distav.distributed.deepspeed_internals import (
    parameter_shards,
    partition_parameters,
    sync_model_weights,
    torch_optimizer,
)

WEIGHT = "weight"


def export_sharded_state(engine: Any) -> tuple[dict[str, Tensor], int]:
    """Copy this rank's ranges of the state to the CPU.

    Returns:
        Tensors named `weight/parameter/start`, `state/parameter/start` for each state of the optimizer, such as
        `exp_avg`, and `buffer/name/0`. Tensors that all ranks hold are divided among the ranks. And the number of steps
        of the optimizer, 0 if it has no state yet.
    """
    tensors: dict[str, Tensor] = {}
    steps, states = 0, torch_optimizer(engine).state
    stage = engine.zero_optimization_stage()
    for position, shard in enumerate(parameter_shards(engine)):
        state = states.get(shard.master, {})
        steps = int(state.get("step", steps))
        is_replicated = stage == 0 or (stage < 3 and not shard.is_trained)
        if shard.size and (not is_replicated or position % get_world_size() == get_rank()):
            for name, values in ((WEIGHT, shard.master), *_elementwise_state(state, shard.master)):
                tensors[f"{name}/{shard.name}/{shard.start}"] = shard.view_of(values).to("cpu", copy=True)
    for position, (name, buffer) in enumerate(engine.module.named_buffers()):
        if position % get_world_size() == get_rank():
            tensors[f"buffer/{name}/0"] = buffer.detach().reshape(-1).to("cpu", copy=True)
    return tensors, steps


def _elementwise_state(state: dict[str, Any], master: Tensor) -> list[tuple[str, Tensor]]:
    """Return the optimizer's tensors with one value per element of `master`."""
    return [
        (name, values)
        for name, values in sorted(state.items())
        if isinstance(values, Tensor) and values.numel() == master.numel() and name != "step"
    ]


def load_sharded_state(engine: Any, read: Callable[[str, int, int], Tensor], steps: int, names: list[str]) -> None:
    """Load a saved state into an engine; all ranks call this.

    Args:
        engine: the DeepSpeed engine.
        read: returns elements [start, start + size) of `name/parameter`; raises ValueError if they were not saved.
        steps: steps of the optimizer; 0 resets its state.
        names: names of its states.
    """
    optimizer = torch_optimizer(engine)
    states, is_fused = optimizer.state, optimizer.defaults["fused"]
    partition_parameters(engine)
    if not steps:
        for state in states.values():
            for values in state.values():
                values.zero_()
    for shard in parameter_shards(engine):
        if not shard.size:
            continue
        shard.view_of(shard.master).copy_(read(f"{WEIGHT}/{shard.name}", shard.start, shard.size))
        if steps and shard.is_trained:
            state = states[shard.master]
            state["step"] = torch.tensor(float(steps), device=shard.master.device if is_fused else "cpu")
            for name in names:
                values = state.setdefault(name, torch.zeros_like(shard.master))
                shard.view_of(values).copy_(read(f"{name}/{shard.name}", shard.start, shard.size))
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(read(f"buffer/{name}", 0, buffer.numel()).view_as(buffer))
    sync_model_weights(engine)
