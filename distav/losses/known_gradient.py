"""Losses whose gradient is computed together with their value."""

from typing import Any

import torch
from torch import Tensor


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient was found along with its value."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, temperature: float | Tensor, losses: Tensor, gradients: Tensor) -> Tensor:
        ctx.learns = ctx.needs_input_grad[1]
        ctx.save_for_backward(gradients, *((queries, temperature) if ctx.learns else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        known, *others = ctx.saved_tensors
        by_temperature = None
        if ctx.learns:  # d loss / d tau = -(q . d loss / d q) / tau
            queries, temperature = others
            by_temperature = -(gradients[0] * (queries * known).sum(1)).sum() / temperature
        return gradients[0][:, None] * known, by_temperature, None, None


def attach_gradient(queries: Tensor, temperature: float | Tensor, losses: Tensor, gradients: Tensor) -> Tensor:
    """Return losses that have a gradient found before.

    Args:
        queries: [b, D] that the losses hang on, divided by the temperature.
        temperature: tau; a tensor of no dimensions gets a gradient too.
        losses: [b].
        gradients: [b, D] of each loss by its query.
    """
    return _KnownGradient.apply(queries, temperature, losses, gradients)  # pyright: ignore[reportReturnType]
