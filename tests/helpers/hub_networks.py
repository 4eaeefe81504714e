"""Small networks with random weights in the format of the Hugging Face hub, one of each kind."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SIDE = 32
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": SIDE, "patch_size": 8}
SPEECH = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
VISUAL_MOMENTS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


def _text() -> dict[str, Any]:
    return TRANSFORMER | {"vocab_size": 64, "projection_dim": 16, "max_position_embeddings": 16}


def _clip(transformers: Any) -> Any:
    # With this number, the features of a text are those at its token of the highest number.
    text = _text() | {"eos_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=TRANSFORMER | IMAGE))


def _siglip(transformers: Any) -> Any:
    config = transformers.SiglipConfig(text_config=_text(), vision_config=TRANSFORMER | IMAGE)
    return transformers.SiglipModel(config)


def _clap(transformers: Any, enable_fusion: bool) -> Any:
    audio = {
        "hidden_size": 32,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
    }
    audio |= {"spec_size": 256, "num_mel_bins": 64, "window_size": 4, "enable_fusion": enable_fusion}
    audio |= {"hidden_size": 64, "projection_dim": 16}
    return transformers.ClapModel(transformers.ClapConfig(text_config=_text(), audio_config=audio))


PE_TRANSFORMER = TRANSFORMER | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}


def _pe_text() -> dict[str, Any]:
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return TRANSFORMER | {"num_hidden_layers": 1, "vocab_size": 64} | special


def _pe_audio_encoder() -> dict[str, Any]:
    codec = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 4, 5], "hidden_size": 32, "codebook_dim": 16}
    return PE_TRANSFORMER | {"dac_config": codec | {"hop_length": 40}}


def _pe_video_encoder() -> dict[str, Any]:
    image = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    image_network = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": image, "num_labels": 24}
    return PE_TRANSFORMER | {"vision_config": image_network | {"model_type": "timm_wrapper"}}


def _pe_audio(transformers: Any) -> Any:
    config = transformers.PeAudioConfig(text_config=_pe_text(), audio_config=_pe_audio_encoder())
    return transformers.PeAudioModel(config)


def _pe_video(transformers: Any) -> Any:
    config = transformers.PeVideoConfig(text_config=_pe_text(), video_config=_pe_video_encoder())
    return transformers.PeVideoModel(config)


def _pe_audio_video(transformers: Any) -> Any:
    both = PE_TRANSFORMER | {"audio_config": _pe_audio_encoder(), "video_config": _pe_video_encoder()}
    config = transformers.PeAudioVideoConfig(text_config=_pe_text(), audio_video_config=both)
    return transformers.PeAudioVideoModel(config)


VISUAL: dict[str, Callable[[Any], Any]] = {
    "clip": _clip,
    "siglip": _siglip,
    "vit": lambda t: t.ViTModel(t.ViTConfig(**TRANSFORMER, **IMAGE)),
    "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**TRANSFORMER, **IMAGE)),
    "resnet": lambda t: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    "convnext": lambda t: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)),
    "videomae": lambda t: t.VideoMAEModel(t.VideoMAEConfig(**TRANSFORMER, **IMAGE, num_frames=4)),
    "timesformer": lambda t: t.TimesformerModel(t.TimesformerConfig(**TRANSFORMER, **IMAGE, num_frames=4)),
    "vivit": lambda t: t.VivitModel(
        t.VivitConfig(**TRANSFORMER, image_size=SIDE, tubelet_size=[2, 8, 8], num_frames=4)
    ),
    "pe_video": _pe_video,
    "pe_audio_video": _pe_audio_video,
    "vjepa2": lambda t: t.VJEPA2Model(
        t.VJEPA2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2.0, crop_size=SIDE, patch_size=8,
            frames_per_clip=4, pred_hidden_size=32, pred_num_hidden_layers=1, pred_num_attention_heads=2,
        )
    ),
}  # fmt: skip
"""Visual networks by model type."""

AUDIO: dict[str, Callable[[Any], Any]] = {
    "ast": lambda t: t.ASTModel(t.ASTConfig(**TRANSFORMER, max_length=128, num_mel_bins=32)),
    "clap": lambda t: _clap(t, enable_fusion=False),
    "clap_fusion": lambda t: _clap(t, enable_fusion=True),
    "wav2vec2": lambda t: t.Wav2Vec2Model(t.Wav2Vec2Config(**TRANSFORMER, **SPEECH)),
    "hubert": lambda t: t.HubertModel(t.HubertConfig(**TRANSFORMER, **SPEECH)),
    "pe_audio": _pe_audio,
    "pe_audio_video": _pe_audio_video,
    "whisper": lambda t: t.WhisperModel(
        t.WhisperConfig(
            d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=32, max_source_positions=100, vocab_size=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ),
}  # fmt: skip
"""Audio networks by model type."""


def _extractors(transformers: Any) -> dict[str, Any]:
    return {
        "ast": transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=128),
        "clap": transformers.ClapFeatureExtractor(truncation="rand_trunc", max_length_s=1, sampling_rate=16000),
        "clap_fusion": transformers.ClapFeatureExtractor(truncation="fusion", max_length_s=1, sampling_rate=16000),
        "wav2vec2": transformers.Wav2Vec2FeatureExtractor(do_normalize=True),
        "hubert": transformers.Wav2Vec2FeatureExtractor(do_normalize=True),
        "pe_audio": transformers.PeAudioFeatureExtractor(sampling_rate=16000, hop_length=40),
        "pe_audio_video": transformers.PeAudioFeatureExtractor(sampling_rate=16000, hop_length=40),
        "whisper": transformers.WhisperFeatureExtractor(feature_size=32, chunk_length=2),
    }


def save_visual(kind: str, folder: Path) -> Any:
    """Save a visual network with a preprocessor to a folder, and return the network in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    net = VISUAL[kind](transformers).eval()
    net.save_pretrained(folder)
    preprocessor = VISUAL_MOMENTS | {"size": {"height": SIDE, "width": SIDE}}
    if kind == "pe_audio_video":  # Its other file is for the audio.
        (folder / "video_preprocessor_config.json").write_text(json.dumps(preprocessor))
        preprocessor = {"feature_extractor_type": "PeAudioFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return net


def save_audio(kind: str, folder: Path) -> tuple[Any, Any]:
    """Save an audio network with its feature extractor to a folder, and return both."""
    import transformers

    torch.manual_seed(0)
    net, extractor = AUDIO[kind](transformers).eval(), _extractors(transformers)[kind]
    net.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return net, extractor


def save_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Save a tokenizer that knows these words, all others as one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<s>", "</s>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
