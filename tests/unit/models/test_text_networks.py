"""Text networks: the similarities of clips and texts that the networks of transformers compute."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distav.config.errors import UserError
from distav.models.families.text_networks import SPACES, TextNetwork
from distav.models.families.transformers_networks import pooled
from tests.helpers.hub_networks import AUDIO, SIDE, VISUAL, save_audio, save_tokenizer, save_visual

transformers = pytest.importorskip("transformers")
TEXTS = ["a dog barks", "a cat"]
CPU, KEY = torch.device("cpu"), "--networks"


def save(kind: str, folder: Path) -> Any:
    """Save a small network with a tokenizer and return it."""
    net = save_visual(kind, folder) if kind in VISUAL else save_audio(kind, folder)[0]
    save_tokenizer(folder, [word for text in TEXTS for word in text.split()])
    return net


def similarities(kind: str, net: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of clips and `TEXTS` by the network itself."""
    positions = net.config.text_config.max_position_embeddings
    padding = "max_length" if kind == "siglip" else True
    tokens = transformers.AutoTokenizer.from_pretrained(net.name_or_path)(
        TEXTS, padding=padding, max_length=positions, return_tensors="pt"
    )
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    if kind in ("clip", "siglip"):
        outputs = net(pixel_values=inputs, **tokens)
        return outputs.image_embeds @ outputs.text_embeds.T
    if kind == "clap":
        is_longer = torch.zeros(len(inputs), 1, dtype=torch.bool)
        outputs = net(input_features=inputs, is_longer=is_longer, **tokens)
        return outputs.audio_embeds @ outputs.text_embeds.T
    if kind == "pe_audio":
        outputs = net(input_values=inputs, **tokens)
        clips, texts = outputs.audio_embeds, outputs.text_audio_embeds
    else:
        outputs = net(pixel_values_videos=inputs, **tokens)
        clips, texts = outputs.video_embeds, outputs.text_video_embeds
    return torch.cosine_similarity(clips[:, None], texts[None], dim=2)


@pytest.mark.parametrize("kind", [kind for kind in SPACES if kind != "pe_audio_video"])
@torch.inference_mode()
def test_similarities_are_those_of_the_checkpoint(kind: str, tmp_path: Path):
    net = save(kind, tmp_path)
    net.name_or_path = str(tmp_path)
    generator = torch.Generator().manual_seed(1)
    (modality,) = SPACES[kind]
    if kind in ("clip", "siglip"):
        inputs = torch.randn(3, 3, SIDE, SIDE, generator=generator)
        features = net.vision_model(pixel_values=inputs).pooler_output
    elif kind == "clap":
        inputs = torch.randn(3, 1, 1001, 64, generator=generator)
        is_longer = torch.zeros(3, 1, dtype=torch.bool)
        features = net.audio_model(inputs, is_longer=is_longer).pooler_output
    elif kind == "pe_audio":
        inputs = 0.1 * torch.randn(3, 1, 16000, generator=generator)
        features = net.audio_encoder(inputs).pooler_output
    else:
        inputs = torch.randn(3, 4, 3, SIDE, SIDE, generator=generator)
        features = pooled(net.video_encoder(inputs), net.video_encoder)
    network = TextNetwork(KEY, f"hf:{tmp_path}", CPU)
    assert network.modalities == [modality]
    own = network.project(features, modality) @ network.embed(TEXTS, modality).T
    torch.testing.assert_close(own, similarities(kind, net, inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=f"has features of width .*, the exported tower {features.shape[1] + 1}"):
        network.project(torch.zeros(1, features.shape[1] + 1), modality)


@torch.inference_mode()
def test_both_modalities_of_an_audio_visual_network_are_compared_with_texts(tmp_path: Path):
    net = save("pe_audio_video", tmp_path)
    network = TextNetwork(KEY, f"hf:{tmp_path}", CPU)
    assert network.modalities == ["visual", "audio"]
    for modality, part, name in (("visual", net.video_model, "video"), ("audio", net.audio_model, "audio")):
        features = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
        own = network.project(features, modality)
        head = getattr(part, f"{name}_head")(features)
        torch.testing.assert_close(own, torch.nn.functional.normalize(head, dim=1), rtol=1e-4, atol=1e-5)
        assert network.embed(TEXTS, modality).shape == own.shape


def test_towers_of_another_network_are_rejected(tmp_path: Path):
    save("clip", tmp_path)
    network = TextNetwork(KEY, f"hf:{tmp_path}", CPU)
    own = {"name": "hf:clip", "architecture": {"network": {"model_type": "clip_vision_model"}}}
    network.check_tower("visual", own)
    with pytest.raises(UserError, match="frame_pooling=transformer, which changes the space"):
        network.check_tower("visual", own | {"frame_pooling": "transformer"})
    for settings, kind in (
        ({"name": "vit", "architecture": {"network": {"model_type": "vit"}}}, "vit"),
        ({"name": "timm:vit_base", "architecture": {"network": "vit_base"}}, "timm:vit_base"),
        ({"name": "small_conv", "architecture": {}}, "small_conv"),
    ):
        with pytest.raises(UserError, match=f"of type clip_vision_model, the exported visual tower of type {kind}"):
            network.check_tower("visual", settings)


def test_checkpoints_without_a_known_text_network_are_rejected(tmp_path: Path):
    kind = "vit"
    save(kind, tmp_path)
    with pytest.raises(UserError, match="--networks=hf:.*: a network of type vit; allowed: clip"):
        TextNetwork(KEY, f"hf:{tmp_path}", CPU)
    with pytest.raises(UserError, match="--networks=ViT-B: allowed: hf:REPOSITORY"):
        TextNetwork(KEY, "ViT-B", CPU)
    assert set(SPACES) <= VISUAL.keys() | AUDIO.keys()
