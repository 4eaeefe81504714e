"""DeepSpeed's optimizer for ZeRO-1 and ZeRO-2 with operations over all parameters at once.

DeepSpeed launches about 17 kernels per parameter and step to reduce gradients, check them and compute their norm. For
transformers with hundreds of parameters, the launches take a third of a step. Results are equal to DeepSpeed's.

This module imports DeepSpeed, so it must be imported after the accelerator is selected.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


def batch_operations(optimizer: Any) -> None:
    """Replace operations on single parameters, if the optimizer is DeepSpeed's for ZeRO-1 or ZeRO-2 on the device."""
    if type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload:
        optimizer.__class__ = BatchedZeroOptimizer


class BatchedZeroOptimizer(DeepSpeedZeroOptimizer):
    """An optimizer for ZeRO-1 and ZeRO-2 with operations over all parameters at once.

    At ZeRO-1, the number of kernels does not grow with the number of parameters. At ZeRO-2, two kernels per parameter
    remain, which copy its gradient as soon as it is computed.
    """

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients over the ranks (ZeRO-1)."""
        if self.overlap_comm or self.contiguous_gradients or set(self.ipg_buckets) != {self.dtype}:
            super().reduce_gradients(pipeline_parallel)
            return
        if comm.get_world_size(group=self.dp_process_group) > 1:
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
            norms = torch.ops.aten._foreach_norm.Scalar(gradients, float(norm_type), torch.float64)
            total = torch.stack(norms).pow(norm_type).sum().float()
        else:
            total = torch.zeros((), device=self.device)
        comm.all_reduce(total, op=comm.ReduceOp.SUM, group=self.dp_process_group)
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
