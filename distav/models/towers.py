"""Towers: a network for one modality with everything between a batch of clips and its features.

Legend: B clips, T frames, H W pixels, N audio samples, F mel bins, L spectrogram frames, E feature width.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.model import AudioConfig, TowerConfig, VisualConfig
from distav.config.registry import Registry
from distav.config.schema import DataConfig
from distav.distributed.rng import uniform
from distav.models import audio_encoders, lora, visual_encoders
from distav.models.blocks import drop_paths, lr_scales, recompute_activations
from distav.models.encoder import AudioEncoder, Encoder, VisualEncoder
from distav.models.families.timm_networks import TimmNetwork
from distav.models.families.torchvision_networks import TorchvisionNetwork
from distav.models.families.transformers_audio import TransformersAudio
from distav.models.families.transformers_visual import TransformersVisual
from distav.models.input_checks import check_audio, check_frames, check_seeds
from distav.models.layers import GlobalBatchNorm
from distav.models.vit import VIT_SIZES

MASK_STREAM = 1
"""Stream of a sample's random numbers for its spectrogram masks."""

VISUAL_TOWERS: Registry[type[VisualEncoder]] = Registry(
    "model.visual.name",
    "distav.visual_towers",
    {
        "small_conv": visual_encoders.SmallConv,
        "r2plus1d_18": visual_encoders.R2Plus1D18,
        **dict.fromkeys(VIT_SIZES, visual_encoders.TubeletViT),
        "torchvision:": TorchvisionNetwork,
        "timm:": TimmNetwork,
        "hf:": TransformersVisual,
    },
)
"""Networks that `model.visual.name` selects."""

AUDIO_TOWERS: Registry[type[AudioEncoder]] = Registry(
    "model.audio.name",
    "distav.audio_towers",
    {
        "small_conv": audio_encoders.SmallConv,
        "avid_conv": audio_encoders.AvidConv,
        **dict.fromkeys(VIT_SIZES, audio_encoders.SpectrogramViT),
        "hf:": TransformersAudio,
    },
)
"""Networks that `model.audio.name` selects."""


class Tower(nn.Module):
    """A network with the settings of its training: frozen blocks, skipped blocks, adapters and learning rates.

    Attributes:
        net: the network.
        feature_dim: width E of its features.
        unfreeze_after: epochs after which frozen blocks are trained; 0 for never.
    """

    lr_group = "towers"

    def __init__(self, net: Encoder, config: TowerConfig, activation_checkpointing: bool):
        super().__init__()
        self.net, self.feature_dim = net, net.feature_dim
        blocks = net.blocks()
        self.unfreeze_after = config.unfreeze_after
        if config.freeze > len(blocks):
            raise UserError(
                f"{net.key}.freeze={config.freeze}: {config.name} has {len(blocks)} blocks; allowed: -1 (all) to "
                f"{len(blocks)}."
            )
        if config.unfreeze_after and not config.freeze:
            raise UserError(
                f"{net.key}.unfreeze_after={config.unfreeze_after} has no effect with {net.key}.freeze=0; set "
                "freeze to a number of blocks, or -1 for all, or remove the setting."
            )
        self._frozen = tuple(blocks if config.freeze < 0 else blocks[: config.freeze])
        frozen = _frozen_parameters(net.backbone, blocks, config.freeze)
        scales = lr_scales(net.backbone, blocks, config.lr_decay)
        self._learning_options = {
            name: (scales.get(id(parameter), 1.0), self.unfreeze_after * (id(parameter) in frozen))
            for name, parameter in net.named_parameters()
        }
        if config.batch_norm == "running":
            for module in net.modules():
                if isinstance(module, GlobalBatchNorm):
                    module.uses_batch = False
        if not self.unfreeze_after:
            for parameter in net.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) not in frozen)
        self._drop_paths = drop_paths(blocks, config.drop_path) if config.drop_path else []
        if config.lora_rank:
            trained = [block for block in blocks if block not in self._frozen]
            if not trained:
                raise UserError(
                    f"{net.key}.lora_rank={config.lora_rank} contradicts {net.key}.freeze={config.freeze}, which "
                    "leaves no block for adapters; use one of them."
                )
            lora.add_adapters(net.backbone, trained, config.lora_rank, config.lora_alpha, net.key)
        self._is_frozen = bool(self._frozen)
        for block in blocks:
            if block in self._frozen:
                self._compute_without_gradients(block)
            elif activation_checkpointing:
                recompute_activations(block)

    def _compute_without_gradients(self, block: nn.Module) -> None:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_frozen):
                return original(*args, **kwargs)

        block.forward = forward

    def train(self, mode: bool = True) -> "Tower":
        """Set training or evaluation mode; frozen blocks stay in evaluation mode."""
        super().train(mode)
        if self._is_frozen:
            for block in self._frozen:
                block.eval()
        return self

    def set_epoch(self, epoch: int) -> None:
        """Train the frozen blocks from the epoch `unfreeze_after` on."""
        is_frozen = bool(self._frozen) and not 0 < self.unfreeze_after <= epoch
        if is_frozen != self._is_frozen:
            self._is_frozen = is_frozen
            self.train(self.training)

    def learning_options(self, name: str) -> tuple[float, int]:
        """Return the factor on the learning rate of a parameter of `net`, and the epoch from which it is trained."""
        return self._learning_options.get(name, (1.0, 0))

    def _set_seeds(self, seeds: Tensor | None) -> None:
        for path in self._drop_paths:
            path.seeds = seeds if self.training else None


def _frozen_parameters(backbone: nn.Module, blocks: list[nn.Module], number: int) -> set[int]:
    """Return the identities of frozen parameters; those outside all blocks are frozen with the first block."""
    if not number:
        return set()
    trained = blocks[number:] if number > 0 else []
    kept = {id(parameter) for block in trained for parameter in block.parameters()}
    return {id(parameter) for parameter in backbone.parameters()} - kept


class VisualTower(Tower):
    """Normalization of frames and the encoder that the configuration selects.

    Raises:
        UserError: for an unknown encoder, or one that does not support the shape of the clips.
    """

    def __init__(self, config: VisualConfig, data: DataConfig, activation_checkpointing: bool):
        encoder = VISUAL_TOWERS.select(config.name)
        super().__init__(encoder(config, data), config, activation_checkpointing)
        self._shape = None
        if self.net.has_fixed_frame_size or not self.net.supports_segments:
            num_frames = None if self.net.supports_segments else data.num_frames
            self._shape = (num_frames, data.frame_size, data.frame_size)
        self._input = encoder.input_format(config)
        self._moments: dict[torch.device, Tensor] = {}

    def forward(self, frames: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Encode frames [B, T, H, W, 3] uint8 to [B, E]; `seeds` [B] int64 choose skipped blocks in training.

        Raises:
            ValueError: for frames or seeds of another type or shape.
        """
        check_frames(frames, self._shape)
        if seeds is not None:
            check_seeds(seeds, len(frames))
        self._set_seeds(seeds)
        return self.net(self._normalize(frames, next(self.net.parameters()).dtype).permute(0, 4, 1, 2, 3))

    def _normalize(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """Subtract the mean and divide by the standard deviation of the network's input, computed in float32."""
        moments = self._moments.get(frames.device)
        if moments is None:  # Not a buffer: a cast of the model to bfloat16 would round it.
            values = [list(self._input.mean), list(self._input.std)]
            moments = torch.tensor(values, device=frames.device, dtype=torch.float32)
            if not torch.compiler.is_exporting():  # Tensors of a trace have no values outside of it.
                self._moments[frames.device] = moments
        mean, std = moments
        if frames.is_cuda:  # One kernel reads uint8 and writes the result; a CPU would convert all frames first.
            return torch.addcmul(-mean / std, frames, 1 / (255 * std), out=torch.empty_like(frames, dtype=dtype))
        return frames.float().div_(255).sub_(mean).div_(std).to(dtype)


class AudioTower(Tower):
    """Front end, spectrogram masking in training, and the encoder that the configuration selects.

    Raises:
        UserError: for an unknown encoder, or one that does not support the length of the audio.
    """

    def __init__(self, config: AudioConfig, data: DataConfig, sample_rate_hz: int, activation_checkpointing: bool):
        encoder = AUDIO_TOWERS.select(config.name)
        num_samples = round(data.audio_s * sample_rate_hz)
        front_end = encoder.build_front_end(config, num_samples, sample_rate_hz)
        super().__init__(encoder(config, front_end.num_frames(num_samples)), config, activation_checkpointing)
        self.front_end = front_end
        self._num_samples = None if self.net.supports_segments else num_samples
        self.mask_mels, self.mask_time = config.mask_mels, config.mask_time

    def forward(self, audio: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Encode audio [B, N] float32 in [-1, 1] to [B, E].

        Args:
            audio: the audio at the sample rate of the dataset.
            seeds: [B] int64, seeds of masks and skipped blocks in training.

        Raises:
            ValueError: for audio or seeds of another type or shape.
        """
        check_audio(audio, cast(int, self.front_end.min_samples), self._num_samples)
        if seeds is not None:
            check_seeds(seeds, len(audio))
        self._set_seeds(seeds)
        x = self.front_end(audio)
        if self.training and seeds is not None:
            x = self._mask(x, seeds)
        return self.net(x.to(next(self.net.parameters()).dtype))

    def spectrogram(self, audio: Tensor) -> Tensor | None:
        """Return the spectrogram [B, F, L] of audio [B, N] that the network sees; None if it takes waveforms."""
        if self.front_end.mel_dim is None:
            return None
        # Calling the module itself would run ZeRO-3's hooks, which wait for all ranks.
        x = self.front_end.forward(audio).movedim((self.front_end.mel_dim, self.front_end.time_dim), (-2, -1))
        return x if x.dim() == 3 else x[:, 0]

    def _mask(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Set a frequency band and a time interval of each spectrogram to its mean (SpecAugment, Park et al. 2019)."""
        mel_dim, time_dim = self.front_end.mel_dim, self.front_end.time_dim
        if mel_dim is None or time_dim is None:
            return x
        draws, mean = uniform(seeds, MASK_STREAM, 4), x.mean((mel_dim, time_dim), keepdim=True)
        for dim, fraction, first in ((mel_dim, self.mask_mels, 0), (time_dim, self.mask_time, 2)):
            size = x.shape[dim]
            length = draws[:, first] * fraction * size
            start = draws[:, first + 1] * (size - length)
            position = torch.arange(size, device=x.device)
            masked = (position >= start[:, None]) & (position < (start + length)[:, None])
            x = torch.where(masked.view(len(x), *(size if axis == dim else 1 for axis in range(1, x.dim()))), mean, x)
        return x
