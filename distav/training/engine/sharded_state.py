"""Weights and optimiser state as ranges of flattened parameters, however DeepSpeed lays them out.

A rank saves the ranges that it holds, and finds its own in those that any number of ranks saved at any ZeRO stage.
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
    """Elements of one parameter whose float32 values this rank holds.

    Attributes:
        name: the parameter.
        start: place of its first element in the flattened parameter.
        stepped: the float32 tensor that the optimiser steps; elements of many parameters may lie in it.
        offset: place of the first element in the flattened `stepped`.
        size: number of elements.
    """

    name: str
    start: int
    master: Tensor
    offset: int
    size: int

    def of(self, whole: Tensor) -> Tensor:
        """Return this piece of `stepped` or of a tensor that belongs to it: a view [size]."""
        return whole.detach().view(-1)[self.offset : self.offset + self.size]


def parameter_shards(engine: Any) -> Iterator[ParameterShard]:
    """Yield what this rank holds of every trained parameter of a DeepSpeed engine."""
    optimizer = engine.optimizer
    stepped: dict[int, Any] = {id(low): high for low, high in _masters(optimizer)}
    flats = [each for group in engine.basic_optimizer.param_groups for each in group["params"]]
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts of every parameter, the last one filled up.
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            size = max(0, min(size, parameter.ds_numel - start))
            yield ParameterShard(name, start, optimizer.fp32_partitioned_groups_flat[group], offset, size)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: a range of all parameters in a row.
            if parameter._hp_mapping is not None:
                part, address = parameter._hp_mapping.hp_fragment, parameter._hp_mapping.lp_fragment_address
                storage = part.untyped_storage().data_ptr()
                flat = next(each for each in flats if each.untyped_storage().data_ptr() == storage)
                yield ParameterShard(
                    name, address.start, flat, part.storage_offset() - flat.storage_offset(), address.numel
                )
        else:
            master: Tensor = stepped.get(id(parameter), parameter)
            yield ParameterShard(name, 0, master, 0, parameter.numel())


def _masters(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parameters in a low precision with their float32 masters, where no ZeRO stage cuts them up."""
    for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False):
        yield from zip(low, high, strict=True)


def export_sharded_state(engine: Any) -> tuple[dict[str, Tensor], int]:
    """Copy this rank's part of the state to the CPU.

    Returns:
        Tensors by `kind/parameter/start`, with `weight` and the optimiser's own kinds, and `buffer/name/0`; what all
        ranks hold alike is shared out among them. And the optimiser's steps, 0 where it has no state yet.
    """
    found: dict[str, Tensor] = {}
    steps, states = 0, engine.basic_optimizer.state
    whole = engine.zero_optimization_stage() == 0
    for number, piece in enumerate(parameter_shards(engine)):
        state = states.get(piece.master, {})
        steps = int(state.get("step", steps))
        if piece.size and (not whole or number % get_world_size() == get_rank()):
            for kind, values in ((WEIGHT, piece.master), *_like(state, piece.master)):
                found[f"{kind}/{piece.name}/{piece.start}"] = piece.of(values).to("cpu", copy=True)
    for number, (name, buffer) in enumerate(engine.module.named_buffers()):
        if number % get_world_size() == get_rank():
            found[f"buffer/{name}/0"] = buffer.detach().reshape(-1).to("cpu", copy=True)
    return found, steps


def _like(state: dict[str, Any], stepped: Tensor) -> list[tuple[str, Tensor]]:
    return [
        (kind, values)
        for kind, values in sorted(state.items())
        if isinstance(values, Tensor) and values.numel() == stepped.numel() and kind != "step"
    ]


def load_sharded_state(engine: Any, read: Callable[[str, int, int], Tensor], steps: int, kinds: list[str]) -> None:
    """Fill a new engine with saved state; every rank calls this.

    Args:
        engine: DeepSpeed's.
        read: returns elements [start, start + size) of `kind/parameter`; raises ValueError where they were not saved.
        steps: the optimiser's steps; at 0 it starts afresh.
        kinds: its kinds of state.
    """
    states = engine.basic_optimizer.state
    if hasattr(engine.optimizer, "_partition_all_parameters"):
        engine.optimizer._partition_all_parameters()
    if not steps:
        for state in states.values():
            for value in state.values():
                value.zero_()
    for piece in parameter_shards(engine):
        if not piece.size:
            continue
        piece.of(piece.master).copy_(read(f"{WEIGHT}/{piece.name}", piece.start, piece.size))
        if steps:
            state = states[piece.master]
            state["step"] = torch.tensor(float(steps))
            for kind in kinds:
                values = state.setdefault(kind, torch.zeros_like(piece.master))
                piece.of(values).copy_(read(f"{kind}/{piece.name}", piece.start, piece.size))
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(read(f"buffer/{name}", 0, buffer.numel()).view_as(buffer))
    _sync_model_weights(engine.optimizer)


def _sync_model_weights(optimizer: Any) -> None:
    """Bring the parameters that the model computes with in line with their float32 masters."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    with torch.no_grad():
        for low, high in _masters(optimizer):
            low.copy_(high)
