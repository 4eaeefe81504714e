"""Blocks of any network: the parts from input to output that are frozen, recomputed, skipped or trained more slowly.

Legend: B clips, n blocks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distav.distributed.deepspeed_internals import full_shape
from distav.distributed.rng import uniform
from distav.models.layers import recomputation

DROP_PATH_STREAM = 16
"""First stream of a sample's random numbers for skipped blocks; each block has its own."""


def find_blocks(net: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in the order in which its modules are defined.

    A block is a module with parameters. Sequences of modules with parts of their own, and modules with more than half
    of the network's parameters, are divided into their parts.
    """
    total = _num_parameters(net)

    def divide(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            size = _num_parameters(child)
            parts = [part for part in child.children() if _num_parameters(part)]
            is_sequence = isinstance(child, nn.Sequential | nn.ModuleList)
            if parts and not _is_unit(child) and (is_sequence or size > total / 2):
                yield from divide(child)
            elif size:
                yield child

    return list(divide(net))


def _num_parameters(module: nn.Module) -> int:
    return sum(full_shape(parameter).numel() for parameter in module.parameters())


def _is_unit(module: nn.Module) -> bool:
    """Return whether a module computes with the weights of its parts itself, or consists of single layers."""
    return isinstance(module, nn.MultiheadAttention) or not any(list(part.children()) for part in module.children())


def lr_scales(backbone: nn.Module, blocks: Sequence[nn.Module], decay: float) -> dict[int, float]:
    """Return the factor on the learning rate of each parameter of a backbone, by its identity.

    It is 1 in the last block, and `decay` times that of the next block in all others. Parameters outside all blocks,
    such as position embeddings, have that of the first block.
    """
    scale_of = {
        id(parameter): decay ** (len(blocks) - 1 - index)
        for index, block in enumerate(blocks)
        for parameter in block.parameters()
    }
    first = decay ** max(0, len(blocks) - 1)
    return {id(parameter): scale_of.get(id(parameter), first) for parameter in backbone.parameters()}


def recompute_activations(block: nn.Module) -> None:
    """Make a block store its inputs alone in training, and compute its activations again in the backward pass."""
    original, is_inside = block.forward, [False]

    def run(*args: Any, **kwargs: Any) -> Any:
        is_inside[0] = True
        try:
            return block(*args, **kwargs)
        finally:
            is_inside[0] = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or is_inside[0]:
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        # A call of the block and not of `original`: hooks of ZeRO-3 gather its weights in the recomputation too.
        return checkpoint(run, *args, use_reentrant=False, context_fn=_checkpoint_contexts, **kwargs)

    block.forward = forward


def _checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), recomputation()


class DropPath:
    """Skips a residual block for single clips in training (stochastic depth, Huang et al. 2016, section 3).

    The choice depends on the seed of the clip alone. The output of a block that is kept is `x + f(x) / (1 - rate)`,
    where the block computes `x + f(x)`. Blocks whose output has another shape than their input are never skipped.

    Attributes:
        rate: probability of skipping the block.
        seeds: [B] int64 of the batch; None in evaluation.
    """

    def __init__(self, block: nn.Module, rate: float, stream: int):
        """Replace the forward method of a block."""
        self.block, self.rate, self.stream = block, rate, stream
        self.seeds: Tensor | None = None
        self._forward = block.forward
        block.forward = self._skip_or_run

    def _skip_or_run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(x, *args, **kwargs)
        if self.seeds is None or not self.block.training:
            return output
        y = output[0] if isinstance(output, tuple) else output
        if y.shape != x.shape or len(x) % len(self.seeds):
            return output
        kept = (uniform(self.seeds, self.stream, 1)[:, 0] >= self.rate) / (1 - self.rate)
        # Networks that see one frame at a time have several rows per clip.
        kept = kept.repeat_interleave(len(x) // len(self.seeds)).view(-1, *[1] * (x.dim() - 1))
        y = x + (y - x) * kept.to(x.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def drop_paths(blocks: Sequence[nn.Module], max_rate: float) -> list[DropPath]:
    """Let residual blocks be skipped, with a probability that increases linearly from 0 to `max_rate` at the last one.

    Blocks with siblings of the same class are taken to be residual, as in ResNets and transformers.
    """
    classes = [type(block) for block in blocks]
    residual = [block for block in blocks if classes.count(type(block)) > 1 and list(block.children())]
    last = max(1, len(residual) - 1)
    rates = [max_rate * index / last for index in range(len(residual))]
    return [
        DropPath(block, rate, DROP_PATH_STREAM + index)
        for index, (block, rate) in enumerate(zip(residual, rates, strict=True))
        if rate
    ]
