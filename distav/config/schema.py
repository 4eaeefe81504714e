"""Settings of a run: name, type, default, bound, meaning and, where a paper fixed it, its source.

The defaults run on a CPU. Units are in the names. AVID is Morgado et al. 2021a.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from distav.config.bounds import above, at_least, between, one_of, satisfies
from distav.config.label_noise import is_label_noise
from distav.config.model import ModelConfig
from distav.config.phases import PhaseConfig
from distav.config.setting_types import FilePath


class Precision(Enum):
    """Number format of parameters and activations; auto: bf16 on a GPU, fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    """Device of the run; auto uses a GPU if there is one."""

    auto = "auto"
    gpu = "gpu"
    cpu = "cpu"


@dataclass
class RunConfig:
    """The run and its directory."""

    name: str = field(
        default="run",
        metadata=satisfies(
            re.compile(r"[\w-][\w.-]*").fullmatch,
            "the name of one directory: letters, digits and the characters . _ -, without a dot at the start",
        ),
    )
    """Directory of the run inside `root`."""
    root: FilePath = "runs"
    """Directory that holds all runs."""
    mirror: FilePath = ""
    """Directory on another file system, or URL (s3://, gs://), that holds a copy of the checkpoints and results of each
    run; a run is restored from it on an empty disk. Empty for none."""
    seed: int = field(default=0, metadata=at_least(0))
    """Seed of initial weights, sample order, augmentation and dropout."""
    device: Device = Device.auto
    """Device: auto, gpu or cpu."""
    log_every: int = field(default=10, metadata=at_least(1))
    """Optimizer steps between two log lines."""
    checkpoint_every: int = field(default=500, metadata=at_least(1))
    """Optimizer steps between two checkpoints. The end of each phase is always saved."""
    keep_checkpoints: int = field(default=2, metadata=at_least(2))
    """Number of checkpoints to keep, at least 2; older ones are deleted."""
    max_consecutive_skipped_steps: int = field(default=10, metadata=at_least(1))
    """Number of consecutive skipped steps (non-finite loss or gradient) after which the run stops."""
    timeout_s: float = field(default=600.0, metadata=above(0, "in seconds"))
    """Maximum number of seconds to wait for a rank; after that, all ranks abort and name it."""
    threads_per_rank: int = field(default=0, metadata=at_least(0))
    """CPU threads of each rank. 0 divides the cores of the machine among its ranks; one of the cores of a rank that
    trains a small network on a CPU is left to the thread that decodes clips."""
    compile: bool = False
    """Compile the networks of the towers with torch.compile, at ZeRO stages 0 to 2. A CPU needs a C++ compiler."""


@dataclass
class SyntheticConfig:
    """Synthetic dataset, rendered at the start of a run if `data.root` holds no dataset."""

    enabled: bool = False
    """Render the synthetic dataset if `data.root` has no manifest.json. Overridden by false if the command line has
    `data.root` and no setting of `data.synthetic`."""
    train_clips: int = field(default=1200, metadata=at_least(1))
    """Number of training clips."""
    test_clips: int = field(default=300, metadata=at_least(0))
    """Number of test clips; they have neither label noise nor mismatched audio."""
    label_noise: str = field(
        default="symmetric:0.4",
        metadata=satisfies(is_label_noise, "symmetric:RATE or asymmetric:RATE with a rate from 0 to 1, or empty"),
    )
    """Label noise of the training split, as for tools/make_shards.py; empty for none."""
    correspondence_noise: float = field(default=0.0, metadata=between(0, 1))
    """Fraction of training clips with the audio of another clip."""
    seed: int = field(default=0, metadata=at_least(0))
    """Seed of the rendering and of the noise."""


@dataclass
class DataConfig:
    """Dataset, clip format and reading."""

    root: FilePath = "shards/quickstart"
    """Dataset: directory or URL (s3://, gs://, https://) with manifest.json, labels.parquet, index.parquet and the tar
    shards."""
    cache: FilePath = ""
    """Local cache directory for a dataset at a URL, shared by ranks and runs; empty for ~/.cache/distav."""
    cache_mib: int = field(default=10240, metadata=at_least(0))
    """Maximum size of the cache in MiB, best that of two shuffle blocks; 0: no cache, one request per sample."""
    train_split: str = "train"
    """Training split."""
    test_split: str = "test"
    """Test split; empty for none."""
    label_overrides: FilePath = ""
    """Table (Parquet or CSV with `id` or `key`, and `label`) of labels that replace the given labels."""
    num_frames: int = field(default=0, metadata=at_least(0))
    """Number of frames passed to the visual tower; 0: those that the tower was made for (4 for networks of distav)."""
    frame_stride: int = field(default=0, metadata=at_least(0))
    """Distance of two of these frames, in stored frames; 0: by the frame rate that the tower was made for (2 where none
    is stated)."""
    frame_size: int = field(default=0, metadata=at_least(0))
    """Height and width of these frames in pixels; 0: those that the tower was made for (32 for networks of distav)."""
    squash: bool = False
    """Without augmentation, resize the full frame to a square instead of cropping the largest square."""
    audio_s: float = field(default=0.0, metadata=at_least(0, "in seconds"))
    """Seconds of audio passed to the audio tower; 0: what the tower was made for (1 for networks of distav)."""
    shuffle_block_shards: int = field(default=64, metadata=at_least(1))
    """Number of shards whose samples are shuffled together. Reads stay inside such a block."""
    decode_threads: int = field(default=0, metadata=at_least(0, "0 to choose by the device"))
    """Decoding threads of each rank; 0: the rank's part of the cores with a GPU, and 1 with a CPU, where training needs
    the cores."""
    prefetch: int = field(default=2, metadata=at_least(1))
    """Number of decoded batches to prefetch."""
    max_quarantined_fraction: float = field(default=0.01, metadata=between(0, 1))
    """Maximum fraction of quarantined samples; the run stops above it."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Synthetic dataset."""


@dataclass
class AugmentConfig:
    """Augmentation of training clips. Its random numbers depend on (seed, epoch, id) alone."""

    crop_area_min: float = field(default=0.5, metadata=satisfies(lambda area: 0 < area <= 1, "above 0, up to 1"))
    """Minimum area of a random resized crop, as a fraction of the frame (AVID: 0.08)."""
    crop_aspect_max: float = field(default=4 / 3, metadata=at_least(1))
    """Maximum aspect ratio of the crop; its inverse is the minimum."""
    flip_prob: float = field(default=0.5, metadata=between(0, 1))
    """Probability of a horizontal flip; use 0 if left and right carry meaning."""
    brightness: float = field(default=0.4, metadata=between(0, 1))
    """Maximum change of the brightness factor from 1 (AVID: 0.4)."""
    contrast: float = field(default=0.4, metadata=between(0, 1))
    """Maximum change of the contrast factor from 1 (AVID: 0.4)."""
    saturation: float = field(default=0.4, metadata=between(0, 1))
    """Maximum change of the saturation factor from 1 (AVID: 0.4)."""
    hue: float = field(default=0.2, metadata=between(0, 1))
    """Maximum rotation of the hue, as a fraction of 180 degrees (AVID: 0.2)."""
    gain: float = field(default=0.1, metadata=between(0, 1))
    """Maximum change of the audio amplitude factor from 1 (AVID: 0.1)."""
    audio_shift_s: float = field(
        default=0.2, metadata=between(0, 0.5, "in seconds; larger shifts would create mismatched pairs")
    )
    """Maximum temporal shift of the audio against the video, in seconds; at most 0.5."""


@dataclass
class MemoryBankConfig:
    """The global cross-modal memory bank."""

    momentum: float = field(default=0.5, metadata=between(0, 1))
    """Momentum of the rows: weight of the previous value in each update (AVID: 0.5)."""
    replicate_below_mib: int = field(default=256, metadata=at_least(0))
    """Size of the memory bank in MiB up to which every rank holds all embeddings, so that the loss needs no
    communication; 0 always shards them."""


@dataclass
class OptimConfig:
    """AdamW, its schedule and the batch size."""

    global_batch: int = field(default=128, metadata=at_least(2))
    """Samples per optimizer step, over all ranks and micro-batches."""
    gradient_accumulation_steps: int = field(default=1, metadata=at_least(1))
    """Micro-batches accumulated per optimizer step."""
    lr: float = field(default=1e-3, metadata=above(0))
    """Learning rate after warmup."""
    min_lr_fraction: float = field(default=0.01, metadata=between(0, 1))
    """Learning rate at the end of the cosine schedule, as a fraction of `lr`."""
    warmup_fraction: float = field(default=0.05, metadata=between(0, 1))
    """Fraction of a phase's steps in which the learning rate increases linearly."""
    weight_decay: float = field(default=1e-4, metadata=at_least(0))
    """Decoupled weight decay of matrices and kernels. Vectors have none."""
    beta1: float = field(default=0.9, metadata=satisfies(lambda beta: 0 <= beta < 1, "0 or more, below 1"))
    """First decay rate of AdamW."""
    beta2: float = field(default=0.99, metadata=satisfies(lambda beta: 0 <= beta < 1, "0 or more, below 1"))
    """Second decay rate of AdamW."""
    grad_clip: float = field(default=5.0, metadata=at_least(0))
    """Maximum global gradient norm; 0 disables clipping."""
    loss_spike_factor: float = field(
        default=0.0, metadata=satisfies(lambda factor: factor == 0 or factor > 1, "a factor above 1, or 0 for never")
    )
    """Roll the run back to the last checkpoint when the loss exceeds this factor times the median of the last 50 steps;
    0 disables it."""
    loss_spike_skip_batches: int = field(default=200, metadata=at_least(0))
    """Batches skipped after the rollback, in addition to those between the checkpoint and the spike (PaLM: 200 to
    500)."""


@dataclass
class FusionConfig:
    """Fusion of the joint, the visual and the audio classifier (`distav.evaluation.fusion`)."""

    held_out_fraction: float = field(default=0.05, metadata=between(0, 0.5))
    """Fraction of the training clips that the losses of supervised phases leave out, at most 5000 clips. The weights of
    the classifiers are fitted to their given labels. 0 classifies clips by the joint classifier alone."""
    min_clips: int = field(default=100, metadata=at_least(1))
    """Minimum number of these clips with both modalities. If there are fewer, no clip is left out, and the joint
    classifier alone is used."""


@dataclass
class DeepSpeedConfig:
    """Settings of DeepSpeed's configuration."""

    zero_stage: int | None = field(
        default=None, metadata=one_of(0, 1, 2, 3, None, note="where null is 1 on a GPU and 0 on a CPU")
    )
    """ZeRO stage: 0, 1, 2 or 3; null is 1 on a GPU and 0 on a CPU. Stage 3 creates the parameters sharded."""
    precision: Precision = Precision.auto
    """Precision: auto, fp32 or bf16."""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Keys merged into DeepSpeed's configuration, e.g. {zero_optimization: {overlap_comm: true}}."""


@dataclass
class MonitorConfig:
    """Figures of the run in TensorBoard, and trackers."""

    media_every: int = field(default=200, metadata=at_least(1))
    """Steps between two logs of frames, spectrograms and audio as passed to the model, with the labels of the clips."""
    media_clips: int = field(default=4, metadata=at_least(0))
    """Number of clips in each of these logs."""
    projector_clips: int = field(default=500, metadata=between(0, 1000))
    """Number of randomly selected training clips whose features the embedding projector of TensorBoard shows at the end
    of the run, at most 1000; 0 disables it."""
    trackers: list[str] = field(default_factory=list[str])
    """Programs that get the settings, the metrics, the images and the report in addition to TensorBoard and
    metrics.jsonl: wandb, mlflow, trackio. Each needs its package, such as `pip install 'distav[wandb]'`."""


@dataclass
class Config:
    """The configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory_bank: MemoryBankConfig = field(default_factory=MemoryBankConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    phases: dict[str, PhaseConfig] = field(default_factory=dict[str, PhaseConfig])
    """The phases by name, in the order in which they run; each has a `kind`."""
