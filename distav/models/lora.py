"""Low-rank adapters of linear layers (LoRA, Hu et al. 2022), by the package peft.

An adapter of a layer with weights W computes with W + (alpha / rank) B A, where A and B are trained.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distav.config.errors import UserError

ADAPTER = "default"
"""Name of the adapter in peft."""
_BASE_LAYER = ".base_layer."


def add_adapters(net: nn.Module, blocks: Sequence[nn.Module], rank: int, alpha: float, key: str) -> None:
    """Add adapters to the linear layers of all blocks; all other parameters of the network become constants.

    Raises:
        UserError: if peft is missing, or there are no linear layers.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{key}.lora_rank={rank}: peft is missing; install it with pip install 'distav[pretrained]'."
        ) from None
    inside = {id(module) for block in blocks for module in block.modules()}
    # nn.MultiheadAttention reads the weights of its layers without calling them.
    attention = [module for module in net.modules() if isinstance(module, nn.MultiheadAttention)]
    excluded = {id(part) for module in attention for part in module.modules()}
    targets = [
        name
        for name, module in net.named_modules()
        if type(module) is nn.Linear and id(module) in inside and id(module) not in excluded
    ]
    if not targets:
        raise UserError(f"{key}.lora_rank={rank}: this network has no linear layers for adapters; allowed: 0.")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]
    peft.inject_adapter_in_model(config, net, ADAPTER)


def to_adapted_names(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return weights under the names that their layers have in a network with adapters.

    Args:
        weights: weights by the names in the network without adapters.
        names: all names in the state dict of the network.
    """
    adapted = {name.replace(_BASE_LAYER, "."): name for name in names if _BASE_LAYER in name}
    return {adapted.get(name, name): values for name, values in weights.items()}


def merged(weights: Mapping[str, Tensor], scale: Mapping[str, float]) -> dict[str, Tensor]:
    """Return weights with the adapters added to their layers, under the names of the network without adapters.

    Args:
        weights: state dict.
        scale: alpha / rank by the first part of the names, such as `visual`.
    """
    result: dict[str, Tensor] = {}
    for name, values in weights.items():
        if re.search(r"\.lora_[AB]\.", name):
            continue
        layer, is_adapted, kind = name.rpartition(_BASE_LAYER)
        if is_adapted and kind == "weight":
            down, up = (weights[f"{layer}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            values = values + scale[name.partition(".")[0]] * torch.mm(up, down)
        result[name.replace(_BASE_LAYER, ".")] = values
    return result
