"""Tiny CLIP and CLAP networks with random weights, in the directory format of the Hugging Face hub."""

from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
)

SIDE = 32


def write_teachers(folder: Path, captions: list[str]) -> None:
    """Write `folder/clip` and `folder/clap`, whose tokenizers have the words of the captions."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(captions)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": len(tokenizer), "max_position_embeddings": 40}  # fmt: skip
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=12))
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder / "clip")
    audio = {"spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "depths": [1, 1],
             "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16, "window_size": 4,
             "enable_fusion": True, "fusion_type": "aff_2d", "aff_block_r": 2}  # fmt: skip
    clap = ClapModel(ClapConfig(text_config=text | special, audio_config=audio, projection_dim=12))
    clap.save_pretrained(folder / "clap")
    extractor = ClapFeatureExtractor(feature_size=16, sampling_rate=16000, max_length_s=2, truncation="fusion")
    extractor.save_pretrained(folder / "clap")
    for name in ("clip", "clap"):
        tokenizer.save_pretrained(folder / name)


def write_prompts(path: Path, folder: Path, classes: list[str], visual: float = -1e9, audio: float = -1e9) -> None:
    """Write prompts for these classes and the teachers in a directory, with a threshold for each modality."""
    entries = {
        name: {"visual": f"a {name}", "visual_threshold": visual, "audio": name, "audio_threshold": audio}
        for name in classes
    }
    content = {
        "visual": {"teacher": "clip", "checkpoint": str(folder / "clip"), "template": "A photo of {}."},
        "audio": {"teacher": "clap", "checkpoint": str(folder / "clap"), "template": "This is a sound of {}"},
        "classes": entries,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def _tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = sorted({word for caption in captions for word in caption.replace(".", " .").split()})
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
