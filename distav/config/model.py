"""Settings of the network: towers, heads and event parser."""

from dataclasses import dataclass, field
from typing import Any, Literal

from distav.config.bounds import above, at_least, between, satisfies
from distav.config.setting_types import FilePath


@dataclass
class TowerConfig:
    """Settings that both towers share."""

    name: str = "small_conv"
    """Entry of `VISUAL_TOWERS` or `AUDIO_TOWERS` in `distav.models.towers`: a network of distav (small_conv, vit_tiny,
    vit_small, vit_base, vit_large, vit_huge; visual: r2plus1d_18; audio: avid_conv), a pretrained one (hf:REPOSITORY or
    hf:DIRECTORY; visual: torchvision:NAME@WEIGHTS, timm:NAME.TAG), or one of an installed package."""
    weights: FilePath = ""
    """Initial weights: a file (safetensors, or a PyTorch file without code) or a directory that holds one; empty for
    those that `name` selects; none for random ones."""
    freeze: int = field(default=0, metadata=at_least(-1, "-1 for all"))
    """Number of blocks from the input that are not trained, embeddings of patches and positions included; -1: the
    complete network."""
    unfreeze_after: int = field(default=0, metadata=at_least(0))
    """Epochs of the run, counted over its phases, after which frozen blocks are trained too; 0 for never."""
    lr_decay: float = field(default=1.0, metadata=satisfies(lambda decay: 0 < decay <= 1, "above 0, up to 1"))
    """Factor on the learning rate from each block to the one before it (layer-wise decay; BEiT: 0.65 to 0.95)."""
    drop_path: float = field(default=0.0, metadata=between(0, 0.9))
    """Probability of skipping the last residual block for a clip in training; it increases linearly from 0 at the first
    block (stochastic depth, Huang et al. 2016)."""
    batch_norm: Literal["batch", "running"] = "batch"
    """Statistics of batch normalization in training: batch (those of the global batch) or running (those of the
    weights, which then stay unchanged)."""
    interpolate_positions: bool = False
    """Interpolate position embeddings where clips have another size or length than those of the weights."""
    lora_rank: int = field(default=0, metadata=at_least(0))
    """Rank of low-rank adapters of the linear layers, which are trained instead of the network (LoRA, Hu et al. 2022);
    0 for none. Needs peft."""
    lora_alpha: float = field(default=16.0, metadata=above(0))
    """Scale of the adapters times their rank."""
    architecture: dict[str, Any] = field(default_factory=dict[str, Any])
    """Layers and preprocessing of a pretrained network, as exports store them; empty: read from where `name` says."""


@dataclass
class VisualConfig(TowerConfig):
    """The visual tower."""

    frame_pooling: Literal["mean", "attention", "transformer"] = "mean"
    """Pooling over time of networks that see single frames: mean, attention (a learned query) or transformer (two
    layers)."""
    width: int = field(default=32, metadata=at_least(1))
    """Channels of the first layer of small_conv."""
    patch: int = field(default=16, metadata=at_least(1))
    """Height and width of a ViT patch in pixels."""
    tubelet: int = field(default=2, metadata=at_least(1))
    """Number of frames of a ViT patch."""


@dataclass
class AudioConfig(TowerConfig):
    """The audio tower with its log-mel front end. Pretrained networks have front ends of their own."""

    width: int = field(default=32, metadata=at_least(1))
    """Channels of the first layer of small_conv."""
    patch: int = field(default=16, metadata=at_least(1))
    """Height and width of a ViT patch in mel bins and spectrogram frames."""
    num_mels: int = field(default=64, metadata=at_least(1))
    """Number of mel bins."""
    window_ms: float = field(default=32.0, metadata=above(0, "in milliseconds"))
    """Length of the analysis window."""
    hop_ms: float = field(default=16.0, metadata=above(0, "in milliseconds"))
    """Time between two spectrogram frames."""
    mask_mels: float = field(default=0.15, metadata=between(0, 1))
    """Maximum width of the frequency mask in training, as a fraction of the mel bins (SpecAugment)."""
    mask_time: float = field(default=0.15, metadata=between(0, 1))
    """Maximum width of the time mask in training, as a fraction of the frames (SpecAugment)."""


@dataclass
class ParserConfig:
    """The hybrid attention network for event parsing (HAN, Tian et al. 2020; sizes: VALOR, Lai 2023)."""

    width: int = field(default=512, metadata=at_least(1))
    """Width of a segment's embedding (VALOR: 512; VALOR+ and VALOR++: 256)."""
    depth: int = field(default=1, metadata=at_least(1))
    """Number of layers (VALOR: 1; VALOR+ and VALOR++: 4)."""
    heads: int = field(default=8, metadata=at_least(1))
    """Number of heads of each attention (VALOR: 8, HAN: 1)."""
    ffn_dim: int = field(default=1024, metadata=at_least(1))
    """Hidden width of the feed-forward network (VALOR: 1024, HAN: 512)."""
    dropout: float = field(default=0.1, metadata=between(0, 1))
    """Dropout inside the layers (HAN: 0.1)."""
    sequential_update: bool = False
    """Visual segments attend to the audio segments that the same layer has updated (the code of VALOR), and not to the
    layer's input (HAN)."""
    joint_pooling: bool = True
    """Pool with one softmax over time and modalities. Otherwise, as published, with the product of one softmax over
    each, whose weights have a sum between 0 and 2."""
    token_grids: dict[str, list[int]] = field(
        default_factory=dict[str, list[int]],
        metadata=satisfies(lambda grid: len(grid) == 2 and min(grid) > 0, "rows and columns, e.g. [2, 32]"),
    )
    """Rows and columns of feature streams that are token grids, such as {clap: [2, 32]} of VALOR++."""


@dataclass
class ModelConfig:
    """Towers and heads."""

    visual: VisualConfig = field(default_factory=VisualConfig)
    """The visual tower."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """The audio tower."""
    parser: ParserConfig = field(default_factory=ParserConfig)
    """The network over segments, in runs with a phase of kind parsing."""
    embed_dim: int = field(default=128, metadata=at_least(1))
    """Width D of the projected embeddings and of the memory bank (AVID: 128)."""
    hidden_dim: int = field(default=256, metadata=at_least(1))
    """Width of the hidden layers of the heads."""
    num_categories: int = field(default=0, metadata=at_least(0))
    """Number K of categories of the category-level head; 0 for the number of classes."""
    learnable_temperature: bool = False
    """Learn the temperature of the instance loss, initialized to 0.07 and limited to 0.01..1, instead of using that of
    the phase."""
    dropout: float = field(default=0.5, metadata=between(0, 1))
    """Dropout before the classifiers."""
    activation_checkpointing: bool = False
    """Recompute the activations of the towers in the backward pass instead of storing them."""
    pretrained: FilePath = ""
    """`export/` directory, or hf://USER/NAME[@REVISION] on the hub, with the initial weights, used where name and shape
    match; empty for none."""
