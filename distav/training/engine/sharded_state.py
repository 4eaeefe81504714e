"""Weights and optimizer state as ranges of flattened parameters, independent of DeepSpeed's memory layout.

Each rank saves the ranges that it holds. On restore, it reads its ranges from files that any number of ranks saved at
any ZeRO stage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distav.distributed.collectives import get_rank, get_world_size

WEIGHT = "weight"


@dataclass(frozen=True)
class ParameterShard:
    """A range of one parameter whose float32 values this rank holds.

    Attributes:
        name: name of the parameter.
        start: index of the first element in the flattened parameter.
        master: float32 tensor that the optimizer updates; it may hold ranges of many parameters.
        offset: index of the first element in the flattened `master`.
        size: number of elements.
        is_trained: whether the optimizer updates it. Ranges of constant parameters are held by all ranks, except at
            ZeRO-3.
    """

    name: str
    start: int
    master: Tensor
    offset: int
    size: int
    is_trained: bool = True

    def view_of(self, values: Tensor) -> Tensor:
        """Return this range of `master` or of a tensor with its layout: a view [size]."""
        return values.detach().view(-1)[self.offset : self.offset + self.size]


def parameter_shards(engine: Any) -> Iterator[ParameterShard]:
    """Yield the ranges that this rank holds, for every parameter of a DeepSpeed engine."""
    optimizer = engine.optimizer
    masters: dict[int, Any] = {id(low): high for low, high in _low_and_high_precision(optimizer)}
    flat_masters = [flat for group in engine.basic_optimizer.param_groups for flat in group["params"]]
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield _constant_shard(name, parameter)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3: equal shards of each parameter, the last one padded.
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            size = max(0, min(size, parameter.ds_numel - start))
            yield ParameterShard(name, start, optimizer.fp32_partitioned_groups_flat[group], offset, size)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: a range of all parameters concatenated.
            if parameter._hp_mapping is not None:
                fragment, address = parameter._hp_mapping.hp_fragment, parameter._hp_mapping.lp_fragment_address
                storage = fragment.untyped_storage().data_ptr()
                master = next(flat for flat in flat_masters if flat.untyped_storage().data_ptr() == storage)
                offset = fragment.storage_offset() - master.storage_offset()
                yield ParameterShard(name, address.start, master, offset, address.numel)
        else:
            yield ParameterShard(name, 0, masters.get(id(parameter), parameter), 0, parameter.numel())


def _constant_shard(name: str, parameter: Any) -> ParameterShard:
    """Return the range of a parameter that is not trained; it has no float32 master."""
    if not hasattr(parameter, "ds_id"):
        return ParameterShard(name, 0, parameter, 0, parameter.numel(), is_trained=False)
    size = parameter.ds_tensor.numel()
    start = size * get_rank()
    return ParameterShard(
        name, start, parameter.ds_tensor, 0, max(0, min(size, parameter.ds_numel - start)), is_trained=False
    )


def _low_and_high_precision(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield low-precision parameters with their float32 masters, for an optimizer without ZeRO."""
    for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False):
        yield from zip(low, high, strict=True)


def export_sharded_state(engine: Any) -> tuple[dict[str, Tensor], int]:
    """Copy this rank's ranges of the state to the CPU.

    Returns:
        Tensors named `weight/parameter/start`, `state/parameter/start` for each state of the optimizer, such as
        `exp_avg`, and `buffer/name/0`. Tensors that all ranks hold are divided among the ranks. And the number of steps
        of the optimizer, 0 if it has no state yet.
    """
    tensors: dict[str, Tensor] = {}
    steps, states = 0, engine.basic_optimizer.state
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
    states, is_fused = engine.basic_optimizer.state, engine.basic_optimizer.defaults["fused"]
    if hasattr(engine.optimizer, "_partition_all_parameters"):
        engine.optimizer._partition_all_parameters()
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
    _sync_model_weights(engine.optimizer)


def _sync_model_weights(optimizer: Any) -> None:
    """Copy the float32 masters to the parameters that the model computes with."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    with torch.no_grad():
        for low, high in _low_and_high_precision(optimizer):
            low.copy_(high)
