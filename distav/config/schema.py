"""Every setting of a run: name, type, default, meaning and, where a paper fixed it, its source.

The defaults run on a CPU. Units are in the names. AVID is Morgado et al. 2021a.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from distav.config.phases import PhaseConfig


class Precision(Enum):
    """Number format of parameters and activations; auto: bf16 on a GPU, fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    """Where the run computes; auto takes a GPU where there is one."""

    auto = "auto"
    gpu = "gpu"
    cpu = "cpu"


@dataclass
class RunConfig:
    """The run and its folder."""

    name: str = "run"
    """Folder of the run inside `root`."""
    root: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    device: Device = Device.auto
    """auto, gpu or cpu."""
    log_every: int = 10
    """Optimiser steps between two lines of the log."""
    checkpoint_every: int = 500
    """Optimiser steps between two checkpoints; phase ends are always saved."""
    keep_checkpoints: int = 2
    """Checkpoints kept, at least 2; older ones are deleted."""
    max_consecutive_skipped_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, and which are skipped, before the run stops."""
    timeout_s: float = 600.0
    """Seconds a rank may keep the others waiting before it is named and all of them stop."""
    threads_per_rank: int = 0
    """CPU threads of each rank; 0: the machine's cores shared among the ranks on it."""


@dataclass
class SyntheticConfig:
    """Shards that the run renders for itself when `data.root` holds none."""

    enabled: bool = False
    """Render the synthetic set when `data.root` has no manifest.json."""
    train_clips: int = 1200
    """Clips to train on."""
    test_clips: int = 300
    """Clips to test on, always clean."""
    label_noise: str = "symmetric:0.4"
    """Share of wrong training labels, as for tools/make_shards.py; empty for none."""
    correspondence_noise: float = 0.0
    """Share of training clips whose sound comes from another clip."""
    seed: int = 0
    """Seed of the rendering and of the noise."""


@dataclass
class DataConfig:
    """Shards, clips and how they are read."""

    root: str = "shards/quickstart"
    """Folder or URL (s3://, gs://, https://) with manifest.json, labels.parquet, index.parquet and the tar shards."""
    cache: str = ""
    """Folder of this machine for what is read of a URL, shared by ranks and runs; empty for ~/.cache/distav."""
    cache_mib: int = 10240
    """Bound of that folder in MiB; 0 reads from afar every time."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split to test on; empty for none."""
    label_overrides: str = ""
    """A table (parquet or csv with `id` or `key`, and `label`) used in place of the given labels."""
    num_frames: int = 4
    """Frames fed to the visual tower."""
    frame_stride: int = 2
    """Stored frames from one fed frame to the next."""
    frame_size: int = 32
    """Height and width fed to the visual tower, in pixels."""
    squash: bool = False
    """Squash whole frames into the square in place of cutting the largest square out of them, where not augmented."""
    audio_s: float = 1.0
    """Seconds of sound fed to the audio tower."""
    shuffle_block_shards: int = 64
    """Shards whose samples are shuffled together; reads stay inside such a block."""
    decode_threads: int = 0
    """Threads of each rank that decode; 0: its share of the cores on a GPU, one on a CPU, where training needs them."""
    prefetch: int = 2
    """Decoded batches kept ready."""
    max_quarantined_fraction: float = 0.01
    """Share of samples that may be unreadable before the run stops."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Shards the run renders for itself."""


@dataclass
class AugmentConfig:
    """Random changes to training clips; parameters are drawn from (seed, epoch, id) alone."""

    crop_area_min: float = 0.5
    """Smallest share of the frame a random resized crop keeps (AVID: 0.08)."""
    crop_aspect_max: float = 4 / 3
    """Largest aspect ratio of that crop, and its inverse the smallest."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip; 0 where left and right carry meaning."""
    brightness: float = 0.4
    """Factor drawn from 1 +- this (AVID: 0.4)."""
    contrast: float = 0.4
    """Factor drawn from 1 +- this (AVID: 0.4)."""
    saturation: float = 0.4
    """Factor drawn from 1 +- this (AVID: 0.4)."""
    hue: float = 0.2
    """Hue turn drawn from +- this share of half a circle (AVID: 0.2)."""
    gain: float = 0.1
    """Sound amplitude factor drawn from 1 +- this (AVID: 0.1)."""
    audio_shift_s: float = 0.2
    """Sound is shifted against the picture by up to this many seconds; 0.5 at most, beyond it pairs come apart."""


@dataclass
class VisualConfig:
    """The visual tower."""

    name: str = "small_conv"
    """small_conv, r2plus1d_18, or vit_tiny, vit_small, vit_base, vit_large, vit_huge."""
    width: int = 32
    """Channels of small_conv's first layer."""
    patch: int = 16
    """Side of a ViT patch in pixels."""
    tubelet: int = 2
    """Frames of a ViT patch."""


@dataclass
class AudioConfig:
    """The audio tower with its log-mel front end."""

    name: str = "small_conv"
    """small_conv, avid_conv, or vit_tiny, vit_small, vit_base, vit_large, vit_huge."""
    width: int = 32
    """Channels of small_conv's first layer."""
    patch: int = 16
    """Side of a ViT patch in mel bins and spectrogram frames."""
    num_mels: int = 64
    """Mel bins."""
    window_ms: float = 32.0
    """Length of the analysis window."""
    hop_ms: float = 16.0
    """Time from one spectrogram frame to the next."""
    mask_mels: float = 0.15
    """Longest masked band in training, as a share of the mel bins (SpecAugment)."""
    mask_time: float = 0.15
    """Longest masked stretch in training, as a share of the frames (SpecAugment)."""


@dataclass
class ParserConfig:
    """The hybrid attention network that tells events heard and seen (HAN, Tian et al. 2020; sizes: VALOR, Lai 2023)."""

    width: int = 512
    """Width of a segment's embedding (VALOR: 512; VALOR+ and VALOR++: 256)."""
    depth: int = 1
    """Layers (VALOR: 1; VALOR+ and VALOR++: 4)."""
    heads: int = 8
    """Heads of each attention (VALOR: 8, HAN: 1)."""
    ffn_dim: int = 1024
    """Hidden width between attentions (VALOR: 1024, HAN: 512)."""
    dropout: float = 0.1
    """Dropout inside the layers (HAN: 0.1)."""
    sequential_update: bool = False
    """Whether pictures attend to sounds that the same layer has updated (VALOR's code), or to what came in (HAN)."""
    joint_pooling: bool = True
    """One softmax over time and modalities; or, as published, one over each, whose products add up to between 0 and 2."""
    token_grids: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Streams of features that are token maps, with their rows and columns, such as {clap: [2, 32]} of VALOR++."""


@dataclass
class ModelConfig:
    """Towers and heads."""

    visual: VisualConfig = field(default_factory=VisualConfig)
    """The visual tower."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """The audio tower."""
    parser: ParserConfig = field(default_factory=ParserConfig)
    """The network over segments of one second, in runs with a phase of kind parsing."""
    embed_dim: int = 128
    """Width D of the projected embeddings and of the bank (AVID: 128)."""
    hidden_dim: int = 256
    """Width of the hidden layers of the heads."""
    num_categories: int = 0
    """Categories K of the category-level head; 0: as many as classes."""
    learnable_temperature: bool = False
    """Learn the temperature of the instance loss, from 0.07 within 0.01 to 1, in place of the phase's."""
    dropout: float = 0.5
    """Dropout before the classifiers."""
    activation_checkpointing: bool = False
    """Recompute tower activations in the backward pass instead of keeping them."""
    pretrained: str = ""
    """An `export/` folder whose weights training starts from, where their names and shapes fit; empty for none."""


@dataclass
class MemoryBankConfig:
    """The global cross-modal memory bank."""

    momentum: float = 0.5
    """Share of the old row kept at each visit (AVID: 0.5)."""
    replicate_below_mib: int = 256
    """Every rank holds all embeddings up to this size in MiB, so that the loss needs no traffic; 0 always shards."""


@dataclass
class OptimConfig:
    """AdamW, its schedule, and the batch."""

    global_batch: int = 128
    """Samples of one optimiser step, over all ranks and accumulated micro-batches."""
    gradient_accumulation_steps: int = 1
    """Micro-batches accumulated in one step."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    min_lr_fraction: float = 0.01
    """Learning rate at the end of the cosine, as a share of `lr`."""
    warmup_fraction: float = 0.05
    """Share of a phase's steps in which the rate rises linearly."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of matrices and kernels; vectors have none."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.99
    """AdamW's second decay rate."""
    grad_clip: float = 5.0
    """Largest global gradient norm; 0 clips nothing."""
    loss_spike_factor: float = 0.0
    """A loss so many times the median of the last 50 steps rolls the run back to the last checkpoint; 0: none does."""
    loss_spike_skip_batches: int = 200
    """Batches left out from the checkpoint on, besides those up to the spike (PaLM: 200 to 500)."""


@dataclass
class DeepSpeedConfig:
    """What becomes DeepSpeed's own configuration."""

    zero_stage: int | None = None
    """ZeRO stage 0, 1, 2 or 3; null: 1 on a GPU, 0 on a CPU. At 3 parameters are created sharded."""
    precision: Precision = Precision.auto
    """auto, fp32 or bf16."""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Keys merged into DeepSpeed's dictionary, e.g. {zero_optimization: {overlap_comm: true}}."""


@dataclass
class MonitorConfig:
    """What is written for TensorBoard besides scalars."""

    media_every: int = 200
    """Steps between two looks at frames, spectrograms and sound as fed to the model."""
    media_clips: int = 4
    """Clips shown each time."""


@dataclass
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory_bank: MemoryBankConfig = field(default_factory=MemoryBankConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    phases: dict[str, PhaseConfig] = field(default_factory=dict[str, PhaseConfig])
    """The phases by name, in the order they run; each has a `kind`."""
