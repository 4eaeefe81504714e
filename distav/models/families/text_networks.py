"""Text networks of transformers, in whose space the features of a tower of the same checkpoint are compared with texts.

CLIP and SigLIP for images, CLAP for audio, PE-AV for audio and video. Legend: n texts or clips, E width of a tower, D
width of the common space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distav.config.errors import UserError, format_list
from distav.models.families.transformers_networks import PARTS
from distav.models.families.transformers_weights import load_checkpoint


@dataclass(frozen=True)
class _Space:
    """Names of the modules of a checkpoint for one modality.

    Attributes:
        projection: module that projects the features of clips; empty if they are used as they are.
        text_head: module that projects the class token of the text network; empty if `get_text_features` does so.
        part: the network that has these modules, if it is a part of the checkpoint.
    """

    projection: str
    text_head: str = ""
    part: str = ""


SPACES = {
    "clip": {"visual": _Space("visual_projection")},
    "siglip": {"visual": _Space("")},
    "clap": {"audio": _Space("audio_projection")},
    "pe_audio": {"audio": _Space("audio_head", "text_audio_head")},
    "pe_video": {"visual": _Space("video_head", "text_video_head")},
    "pe_audio_video": {
        "visual": _Space("video_head", "text_video_head", "video_model"),
        "audio": _Space("audio_head", "text_audio_head", "audio_model"),
    },
}
"""Modalities whose features are compared with texts, by model type."""


class TextNetwork:
    """The text network of a checkpoint, with the projections of its other networks.

    Attributes:
        name: `hf:REPOSITORY`, `hf:REPOSITORY@REVISION` or `hf:DIRECTORY`.
    """

    def __init__(self, key: str, name: str, device: torch.device):
        """Load a checkpoint.

        Args:
            key: setting or option that names the checkpoint, for messages.
            name: name of the checkpoint.
            device: device of the network.

        Raises:
            UserError: if it cannot be loaded, or is of a type without a text network that is known here.
        """
        self.name, self._key, self._device = name, key, device
        network, self._tokenizer = load_checkpoint(key, name)
        model_type = network.config.model_type
        if model_type not in SPACES:
            raise UserError(f"{key}={name}: a network of type {model_type}; allowed: {format_list(SPACES)}.")
        self._spaces: dict[str, _Space] = SPACES[model_type]
        # SigLIP is trained with texts that are padded to the longest length.
        self._padding = "max_length" if model_type == "siglip" else True
        self._network: Any = network.eval().to(device)

    @property
    def modalities(self) -> list[str]:
        """Modalities whose features can be compared with texts."""
        return list(self._spaces)

    @torch.inference_mode()
    def embed(self, texts: list[str], modality: str) -> Tensor:
        """Return the unit vectors of texts in the space of a modality: [n, D] float32."""
        space, part = self._spaces[modality], self._part(modality)
        positions = self._network.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            texts, padding=self._padding, truncation=True, max_length=positions, return_tensors="pt"
        )
        inputs = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask") if name in tokens}
        if space.text_head:
            states = part.text_model(**inputs, output_hidden_states=True).hidden_states[-1]
            return normalize(getattr(part, space.text_head)(states[:, 0]).float(), dim=1)
        return normalize(part.get_text_features(**inputs).pooler_output.float(), dim=1)

    def check_tower(self, modality: str, settings: Mapping[str, Any]) -> None:
        """Check that an exported tower has the network of this checkpoint for a modality.

        Args:
            modality: visual or audio.
            settings: settings of the tower in the description of the export.

        Raises:
            UserError: if it has another one, or changes the space of its features.
        """
        own = self._network_config(modality).model_type
        network = settings["architecture"].get("network")
        exported = network["model_type"] if isinstance(network, Mapping) else settings["name"]
        if exported != own:
            raise UserError(
                f"{self._key}={self.name}: its {modality} network is of type {own}, the exported {modality} tower of "
                f"type {exported}; allowed: the checkpoint that the tower was made from."
            )
        if settings.get("frame_pooling") == "transformer":
            raise UserError(
                f"{self._key}={self.name}: the exported tower has model.visual.frame_pooling=transformer, which "
                "changes the space of its features; allowed: mean or attention."
            )

    def _network_config(self, modality: str) -> Any:
        config = self._part(modality).config
        return next(getattr(config, name) for name in PARTS[modality] if hasattr(config, name))

    @torch.inference_mode()
    def project(self, features: Tensor, modality: str) -> Tensor:
        """Return the unit vectors of the features of a tower: [n, E] -> [n, D] float32.

        Raises:
            UserError: if features of this network have another width.
        """
        space, part = self._spaces[modality], self._part(modality)
        width = self._network_config(modality).hidden_size
        if features.shape[1] != width:
            raise UserError(
                f"{self._key}={self.name}: its {modality} network has features of width {width}, the exported tower "
                f"{features.shape[1]}; allowed: the checkpoint whose network is the exported tower."
            )
        features = features.to(self._device)
        if space.projection:
            features = getattr(part, space.projection)(features)
        return normalize(features.float(), dim=1)

    def _part(self, modality: str) -> Any:
        part = self._spaces[modality].part
        return getattr(self._network, part) if part else self._network
