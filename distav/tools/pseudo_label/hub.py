"""Networks in the format of the Hugging Face hub, loaded by transformers from a directory or by name."""

from typing import Any

import torch
from torch import Tensor

from distav.config.errors import UserError


def import_transformers() -> Any:
    """Return the module `transformers`, or raise a UserError if it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError("teachers need transformers; install it by pip install 'distav[teachers]'.") from None
    return transformers


def load_pretrained(component: Any, checkpoint: str) -> Any:
    """Load a component of a checkpoint; weights only from safetensors, and no code of the checkpoint is executed.

    Args:
        component: class of transformers with a method `from_pretrained`.
        checkpoint: directory, or name on the hub.

    Raises:
        UserError: if the checkpoint does not contain this component.
    """
    options: dict[str, Any] = {"use_safetensors": True} if hasattr(component, "forward") else {}
    try:
        return component.from_pretrained(checkpoint, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint={checkpoint}: cannot load {component.__name__} ({str(error).strip().splitlines()[0]}). "
            "Give a directory in the format of the Hugging Face hub, or a name on the hub that can be downloaded."
        ) from None


def tokenize(transformers: Any, checkpoint: str, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of the captions, [C, L] int64 each."""
    tokenizer = load_pretrained(transformers.AutoTokenizer, checkpoint)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
