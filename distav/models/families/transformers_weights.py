"""Weights of networks of transformers: of checkpoints, and of files with other names."""

from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.model import TowerConfig
from distav.models.families.transformers_networks import (
    advice,
    import_transformers,
    network_class,
    quiet,
    restore_image_width,
    source_of,
)
from distav.models.weights import unavailable, with_names_of

_KEY_MAPPINGS = {
    "clap_audio_model": {r"^audio_model\.": ""},
    "pe_audio_encoder": {r"^(.*\.)?audio_encoder\.": ""},
    "pe_video_encoder": {r"^(.*\.)?video_encoder\.": ""},
}
"""Changes of names in checkpoints of several modalities that transformers does not make itself."""
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError)
"""What transformers raises for files that are missing or that it cannot read."""


def download(config: TowerConfig, modality: str, description: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the network that a tower names, by the names in the network of `build`.

    Raises:
        UserError: if they are neither in a directory or the cache of the hub, nor can be downloaded.
    """
    key = f"model.{modality}.name"
    transformers, (source, revision) = import_transformers(key, config.name), source_of(config.name)
    settings = transformers.AutoConfig.for_model(**description["network"])
    try:
        with quiet(transformers):
            return _load(settings, source, revision=revision, weights_only=True)
    except LOAD_ERRORS as error:
        raise unavailable(key, config.name, error, advice(source)) from None


def with_own_names(
    description: dict[str, Any], weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return weights of a file by the names in the network of `build`.

    Checkpoints have other names than the networks of the present version of transformers, which it changes as it reads
    them.

    Args:
        description: result of `describe`.
        weights: weights by name.
        own: state dict of the network of `build`.
    """
    import transformers

    candidate = with_names_of(weights, own)
    if own.keys() <= candidate.keys():
        return candidate
    settings = transformers.AutoConfig.for_model(**description["network"])
    try:
        with quiet(transformers):
            renamed = _load(settings, None, state_dict=dict(weights))
    except LOAD_ERRORS:
        return candidate
    return max(candidate, renamed, key=lambda found: len(own.keys() & found.keys()))


def _load(settings: Any, source: str | None, **options: Any) -> dict[str, Tensor]:
    """Return the weights that transformers reads, by the names in the network of `build`."""
    net, loaded = network_class(settings).from_pretrained(
        source,
        config=settings,
        dtype=torch.float32,
        output_loading_info=True,
        key_mapping=_KEY_MAPPINGS.get(settings.model_type),
        **options,
    )
    missing = set(loaded["missing_keys"])  # Transformers has given them random values.
    weights = {name: values for name, values in net.state_dict().items() if name not in missing}
    prefix = "encoder." if getattr(net.config, "is_encoder_decoder", False) else ""
    return {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}


def load_checkpoint(key: str, name: str) -> tuple[Any, Any]:
    """Return the network of a checkpoint, with all its parts, and its tokenizer.

    Args:
        key: setting or option that names the checkpoint.
        name: `hf:` and a repository or directory.

    Raises:
        UserError: if either cannot be loaded, or the checkpoint lacks weights of the network.
    """
    if not name.startswith("hf:"):
        raise UserError(f"{key}={name}: allowed: hf:REPOSITORY, hf:REPOSITORY@REVISION or hf:DIRECTORY.")
    transformers, (source, revision) = import_transformers(key, name), source_of(name)
    try:
        with quiet(transformers):
            settings = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            stored, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
            restore_image_width(settings, stored)
            network, loaded = transformers.AutoModel.from_pretrained(
                source, revision=revision, config=settings, dtype=torch.float32, weights_only=True,
                output_loading_info=True,
            )  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise unavailable(key, name, error, advice(source)) from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{key}={name}: the checkpoint lacks {len(missing)} weights of a network of type "
            f"{network.config.model_type}, such as {missing[0]}; download it again."
        )
    return network, tokenizer
