"""Names of DeepSpeed that it does not document; other modules use them through this one.

`tests/unit/test_private_names.py` checks that DeepSpeed has them. DeepSpeed is imported inside of functions: its import
takes seconds and selects the accelerator.
"""

import importlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distav.distributed.collectives import get_rank
from distav.distributed.torch_internals import vector_norms

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as _ZeroOptimizer
else:
    _ZeroOptimizer = object


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter; one that ZeRO-3 has partitioned appears empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def prepare(optimizer_class: type) -> None:
    """Silence DeepSpeed's messages, and let it use an optimizer that it does not know.

    Args:
        optimizer_class: class of the optimizer; DeepSpeed compares exact types and warns about subclasses.
    """
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that PyTorch has replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)
    # This op serves inference only; building it needs a compiler and takes half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def release_groups() -> None:
    """Forget the process groups of DeepSpeed, so that another run of this process creates its own."""
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    groups._release_process_group_references()


def set_collective_timeout(engine: Any, timeout: timedelta) -> None:
    """Set the timeout of the process group that DeepSpeed has created; by default it is half an hour."""
    engine.data_parallel_group.set_timeout(timeout)


def clear_gradients(engine: Any) -> None:
    """Zero the gradients of ZeRO-3; a parameter without one in the next step would keep that of the last step."""
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer of PyTorch that an engine updates the float32 weights with."""
    return engine.basic_optimizer


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
    flat_masters = [flat for group in torch_optimizer(engine).param_groups for flat in group["params"]]
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield _constant_shard(name, parameter)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3: equal shards of each parameter, the last one padded.
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * get_rank()
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


def partition_parameters(engine: Any) -> None:
    """Release the parameters that ZeRO-3 has gathered."""
    if hasattr(engine.optimizer, "_partition_all_parameters"):
        engine.optimizer._partition_all_parameters()


def sync_model_weights(engine: Any) -> None:
    """Copy the float32 masters to the parameters that the model computes with."""
    optimizer = engine.optimizer
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


def batch_operations(engine: Any) -> None:
    """Replace operations on single parameters, if the optimizer is DeepSpeed's for ZeRO-1 or ZeRO-2 on the device."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload:
        optimizer.__class__ = type("BatchedZeroOptimizer", (_BatchedOperations, DeepSpeedZeroOptimizer), {})


class _BatchedOperations(_ZeroOptimizer):
    """Methods of DeepSpeed's optimizer for ZeRO-1 and ZeRO-2 that process all parameters at once.

    DeepSpeed launches about 17 kernels per parameter and step to reduce gradients, check them and compute their norm.
    For transformers with hundreds of parameters, the launches take a third of a step. With these methods, the number of
    kernels does not grow with the number of parameters at ZeRO-1. At ZeRO-2, two kernels per parameter remain, which
    copy its gradient as soon as it is computed. Results are equal to DeepSpeed's.
    """

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients over the ranks (ZeRO-1)."""
        if self.overlap_comm or self.contiguous_gradients or set(self.ipg_buckets) != {self.dtype}:
            super().reduce_gradients(pipeline_parallel)
            return
        if dist.get_world_size(self.dp_process_group) > 1:
            for parameters in self._gradient_buckets():
                gradients = [parameter.grad for parameter in parameters]
                reduced = self.unflatten(self.allreduce_bucket(gradients, self.dtype), gradients)
                for parameter, gradient in zip(parameters, reduced, strict=True):
                    parameter.grad = gradient
        self.overlapping_partition_gradients_reduce_epilogue()

    def _gradient_buckets(self) -> Iterator[list[nn.Parameter]]:
        """Yield parameters with gradients, up to `reduce_bucket_size` elements at a time."""
        bucket, size = [], 0
        for parameter in (parameter for group in self.bit16_groups for parameter in group):
            if parameter.grad is None:
                continue
            if bucket and size + parameter.numel() > self.reduce_bucket_size:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        if bucket:
            yield bucket

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Leave the check to the norm, which is not finite if any gradient is not finite; `step` checks it."""
        if not self.compute_grad_norm:
            super().check_overflow(partition_gradients)

    def get_grad_norm_direct(self, gradients: list[Tensor], params: list[nn.Parameter], norm_type: float = 2) -> Tensor:
        """Return the norm of this rank's gradients of a group, summed over the ranks; a scalar, maybe not finite."""
        gradients = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        gradients = [gradient.detach() for gradient, _ in zip(gradients, params, strict=False)]
        if gradients:
            norms = vector_norms(gradients, float(norm_type), torch.float64)
            total = torch.stack(norms).pow(norm_type).sum().float()
        else:
            total = torch.zeros((), device=self.device)
        dist.all_reduce(total, group=self.dp_process_group)
        return total.pow(1 / norm_type)

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        """Scale flat gradients in place to the maximum norm; reads no value, since `step` has checked the norm."""
        if self.clip_grad == 0 and self.loss_scale == 1:
            return
        scale = self.loss_scale
        if self.clip_grad > 0:
            scale = torch.clamp((total_norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0) * self.loss_scale
        for gradient in grad_groups_flat:
            gradient.mul_(1.0 / scale)

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Make the parameters of a group views of its flat weights, unless they are."""
        flat = self.bit16_groups_flat[group_index].untyped_storage().data_ptr()
        if any(parameter.untyped_storage().data_ptr() != flat for parameter in self.bit16_groups[group_index]):
            super()._update_model_bit16_weights(group_index)
