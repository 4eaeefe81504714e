"""Losses with a gradient that is computed together with their value."""

from typing import Any

import torch
from torch import Tensor


class _KnownGradient(torch.autograd.Function):
    """Identity on the losses; the backward pass returns the given gradients."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, temperature: float | Tensor, losses: Tensor, gradients: Tensor) -> Tensor:
        ctx.learns_temperature = ctx.needs_input_grad[1]
        ctx.save_for_backward(gradients, *((queries, temperature) if ctx.learns_temperature else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        by_query, *temperature_inputs = ctx.saved_tensors
        by_temperature = None
        if ctx.learns_temperature:  # d loss / d tau = -(q . d loss / d q) / tau
            queries, temperature = temperature_inputs
            by_temperature = -(gradients[0] * (queries * by_query).sum(1)).sum() / temperature
        return gradients[0][:, None] * by_query, by_temperature, None, None


def attach_gradient(queries: Tensor, temperature: float | Tensor, losses: Tensor, gradients: Tensor) -> Tensor:
    """Return the losses with gradients that were computed beforehand: [b].

    Args:
        queries: [b, D] embeddings; the losses depend on queries / temperature.
        temperature: tau; receives a gradient if it is a tensor without dimensions.
        losses: [b] values, without gradient.
        gradients: [b, D] gradient of each loss with respect to its query.
    """
    return _KnownGradient.apply(queries, temperature, losses, gradients)  # pyright: ignore[reportReturnType]
