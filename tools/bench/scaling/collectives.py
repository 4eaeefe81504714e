"""The collectives of a training step of the contrastive phase.

Legend: W ranks, b clips of this rank, D embedding dimension, N rows of the memory bank, K categories.
"""

import copy
import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch

from distav.config.phases import ContrastivePhase, Estimator, SoftTargetKind
from distav.config.schema import Config
from distav.models.av_model import AVModel, parameter_groups
from distav.models.layers import GlobalBatchNorm
from tools.bench.scaling.network import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, wire_bytes

BATCH_NORM, BANK, CATEGORIES = "batch normalization", "memory bank", "category loss"
GRADIENTS, PARAMETERS, CONTROL = "gradients", "parameters", "stop flag"
TERMS = (BATCH_NORM, BANK, CATEGORIES, GRADIENTS, PARAMETERS, CONTROL)
"""What the collectives of a step are for."""
PERSISTENT_NUMBERS = 100_000
"""DeepSpeed's `stage3_param_persistence_threshold`: smaller parameters are kept on all ranks at ZeRO-3."""
PREFETCHED_NUMBERS = 50_000_000
"""DeepSpeed's `stage3_prefetch_bucket_size`: numbers that are gathered together at ZeRO-3."""


class NormExchange(Enum):
    """Exchange of the statistics of a batch normalization in the forward pass.

    reduced: the sum over ranks, as in distav. gathered: the statistics of every rank in one tensor, as by
    `torch.nn.SyncBatchNorm`. gathered_in_parts: in a tensor for each rank.
    """

    reduced = "reduced"
    gathered = "gathered"
    gathered_in_parts = "gathered_in_parts"


@dataclass(frozen=True)
class Collective:
    """A collective of a step.

    Attributes:
        term: one of `TERMS`.
        kind: one of `tools.bench.scaling.network.KINDS`.
        num_bytes: size, as `Network.seconds` takes it.
        in_parts: whether an all-gather has one tensor for each rank.
        count: how often it occurs in the step.
    """

    term: str
    kind: str
    num_bytes: float
    in_parts: bool = False
    count: int = 1


@dataclass(frozen=True)
class StepShape:
    """What the collectives of a step depend on, apart from W.

    Attributes:
        clips: b.
        dim: D.
        rows: N.
        categories: K.
        replicated: whether every rank holds all rows of the memory bank.
        softmaxes: softmaxes over the memory bank of each call of the instance loss: cross-modal, within-modal.
        gathers_targets: whether the rows of the batch are queries of soft targets.
        category_memory: whether the category loss uses the rows of the memory bank.
        norms_forward: channels of each batch normalization of the forward pass, recomputed ones included.
        norms_backward: channels of each batch normalization of the backward pass.
        groups: numbers of each parameter group of the optimizer.
        parameters: numbers of each trained parameter.
        num_gradients: numbers of all parameters that receive a gradient in this phase.
        number_bytes: bytes of a gradient and of a parameter in collectives.
        zero_stage: ZeRO stage.
        norm_exchange: exchange of the statistics of a batch normalization.
    """

    clips: int
    dim: int
    rows: int
    categories: int
    replicated: bool
    softmaxes: tuple[int, ...]
    gathers_targets: bool
    category_memory: bool
    norms_forward: tuple[int, ...]
    norms_backward: tuple[int, ...]
    groups: tuple[int, ...]
    parameters: tuple[int, ...]
    num_gradients: int
    number_bytes: int
    zero_stage: int
    norm_exchange: NormExchange = NormExchange.reduced

    @property
    def loss_operations(self) -> float:
        """Floating-point operations of the loss over the memory bank on each rank, 4 b N D for each softmax."""
        return 4.0 * sum(self.softmaxes) * self.clips * self.rows * self.dim

    @property
    def optimizer_share(self) -> bool:
        """Whether each rank updates a part of the parameters only."""
        return self.zero_stage > 0


def shape_of(config: Config, clips: int, rows: int, num_classes: int, sample_rate_hz: int = 24000) -> StepShape:
    """Return the shape of the steps of a configuration, once soft targets are in use.

    The model is built on the meta device, so nothing is computed.

    Args:
        config: settings; their first contrastive phase counts.
        clips: clips of a rank and step.
        rows: N, clips of the dataset.
        num_classes: classes of the dataset; the number of categories if the settings state none.
        sample_rate_hz: sample rate of the audio.
    """
    phase = next(phase for phase in config.phases.values() if isinstance(phase, ContrastivePhase))
    forward, backward, model = _normalizations(config, num_classes, sample_rate_hz)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cross_modal = (
        2 if phase.soft_targets is SoftTargetKind.none or phase.correspondence_estimator is Estimator.none else 4
    )
    bf16 = config.deepspeed.precision.value == "bf16"
    dim = config.model.embed_dim
    return StepShape(
        clips=clips,
        dim=dim,
        rows=rows,
        categories=config.model.num_categories or num_classes,
        replicated=2 * rows * dim * 4 <= config.memory_bank.replicate_below_mib * 2**20,
        softmaxes=(cross_modal, 2) if phase.within_modal_weight else (cross_modal,),
        gathers_targets=cross_modal > 2 and phase.soft_targets in (SoftTargetKind.neighbor, SoftTargetKind.cycle),
        category_memory=phase.category_memory_weight > 0,
        norms_forward=forward,
        norms_backward=backward,
        groups=tuple(sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.1)),
        parameters=tuple(parameter.numel() for parameter in trained),
        num_gradients=sum(parameter.numel() for parameter in trained if parameter.grad is not None),
        number_bytes=2 if bf16 else 4,
        zero_stage=config.deepspeed.zero_stage or 0,
    )


def _normalizations(
    config: Config, num_classes: int, sample_rate_hz: int
) -> tuple[tuple[int, ...], tuple[int, ...], AVModel]:
    """Return the channels of the batch normalizations of forward and backward pass, and the model."""
    data = replace(config.data)
    with torch.device("meta"):
        model = AVModel(copy.deepcopy(config.model), data, sample_rate_hz, num_classes)
    channels: list[int] = []
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm) and module.uses_batch:
            module.register_forward_pre_hook(partial(_append_size, channels, len(module.weight)))
    size, clips = data.frame_size, 2
    media = {
        "frames": torch.zeros(clips, data.num_frames, size, size, 3, dtype=torch.uint8, device="meta"),
        "audio": torch.zeros(clips, round(data.audio_s * sample_rate_hz), device="meta"),
    }
    outputs = model(**media, seeds=torch.zeros(clips, dtype=torch.int64, device="meta"))
    num_first = len(channels)
    trained = ("visual", "audio", "visual_categories", "audio_categories")
    torch.stack([outputs[name].float().sum() for name in trained]).sum().backward()
    return tuple(channels), tuple(channels[:num_first]), model


def step_collectives(shape: StepShape, world_size: int) -> list[Collective]:
    """Return the collectives of a step of W ranks; none with one rank."""
    if world_size == 1:
        return []
    return [
        *_batch_norm(shape, world_size),
        *_bank(shape, world_size),
        *_category_loss(shape),
        *_zero(shape, world_size),
        Collective(CONTROL, ALL_REDUCE, 4),
    ]


def _batch_norm(shape: StepShape, world_size: int) -> list[Collective]:
    in_parts = shape.norm_exchange is NormExchange.gathered_in_parts
    if shape.norm_exchange is NormExchange.reduced:  # In float64.
        forward = [Collective(BATCH_NORM, ALL_REDUCE, 2 * channels * 8) for channels in shape.norms_forward]
    else:
        forward = [
            Collective(BATCH_NORM, ALL_GATHER, world_size * 2 * channels * 4, in_parts)
            for channels in shape.norms_forward
        ]
    return forward + [Collective(BATCH_NORM, ALL_REDUCE, 2 * channels * 4) for channels in shape.norms_backward]


def _bank(shape: StepShape, world_size: int) -> list[Collective]:
    """Global batch, correspondence and agreement of its samples; rows and softmaxes if the rows are sharded."""
    row = 4 * shape.clips
    collectives = [
        Collective(BANK, ALL_GATHER, world_size * (2 * shape.dim + 3) * row),
        Collective(BANK, ALL_TO_ALL, row),
        Collective(BANK, ALL_TO_ALL, (1 + 2 * shape.categories * shape.category_memory) * row),
        Collective(BANK, ALL_REDUCE, 4),  # The sum of the weights of the losses.
    ]
    if shape.replicated:
        return collectives
    for number in shape.softmaxes:
        collectives.append(Collective(BANK, ALL_TO_ALL, 2 * shape.dim * row))
        collectives.append(Collective(BANK, ALL_TO_ALL, world_size * number * (shape.dim + 1) * row))
    if shape.gathers_targets:
        collectives.append(Collective(BANK, ALL_GATHER, world_size * 2 * shape.dim * row))
    return collectives


def _category_loss(shape: StepShape) -> list[Collective]:
    num = shape.categories
    batch = Collective(CATEGORIES, ALL_REDUCE, 4 * (3 * num * num + 2 * num + 3), count=2)
    return [batch, *[Collective(CATEGORIES, ALL_REDUCE, 4 * (3 * num * num + 1))] * shape.category_memory]


def _zero(shape: StepShape, world_size: int) -> list[Collective]:
    """Gradients and parameters, as DeepSpeed reduces and gathers them without `deepspeed.extra`."""
    size = shape.number_bytes
    if shape.zero_stage == 0:
        return [Collective(GRADIENTS, ALL_REDUCE, sum(shape.parameters) * size), Collective(GRADIENTS, ALL_REDUCE, 4)]
    if shape.zero_stage < 3:
        return [
            Collective(GRADIENTS, ALL_REDUCE, shape.num_gradients * size),
            Collective(GRADIENTS, ALL_REDUCE, 4, count=len(shape.groups)),
            *(Collective(PARAMETERS, ALL_GATHER, _padded(numbers, 2 * world_size) * size) for numbers in shape.groups),
        ]
    # Partitioned parameters are gathered together before they are used, persistent ones one by one after the update.
    partitioned = sum(_padded(number, world_size) for number in shape.parameters if number > PERSISTENT_NUMBERS)
    persistent = [_padded(number, world_size) for number in shape.parameters if number <= PERSISTENT_NUMBERS]
    num_gathers = math.ceil(partitioned / PREFETCHED_NUMBERS)
    return [
        Collective(GRADIENTS, REDUCE_SCATTER, shape.num_gradients * size),
        Collective(GRADIENTS, ALL_REDUCE, 8, count=len(shape.groups)),
        *[Collective(PARAMETERS, ALL_GATHER, partitioned * size / num_gathers)] * num_gathers,
        *(Collective(PARAMETERS, ALL_GATHER, numbers * size) for numbers in persistent),
    ]


def _padded(numbers: int, multiple: int) -> int:
    return math.ceil(numbers / multiple) * multiple


def sent_bytes(collectives: list[Collective], world_size: int) -> float:
    """Return the bytes that a rank sends in a step, if all collectives use rings or pairwise exchanges."""
    return sum(item.count * wire_bytes(item.kind, item.num_bytes, world_size) for item in collectives)


def _append_size(sizes: list[int], size: int, *_: object) -> None:
    sizes.append(size)
