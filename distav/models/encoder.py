"""Base classes of visual and audio networks, and the clips that they take.

Legend: B clips, T frames, H W pixels, F mel bins, L spectrogram frames, E feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from distav.config.model import AudioConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.models.blocks import find_blocks
from distav.models.log_mel import FrontEnd, LogMel
from distav.models.weights import read_weights, with_names_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisualInput:
    """Clips that a visual network takes where the data settings do not state others.

    Attributes:
        num_frames: number of frames.
        frame_size: height and width in pixels.
        frame_rate_hz: frames per second; 0 if none is stated.
        mean, std: moments of the RGB channels that normalize frames in [0, 1].
    """

    num_frames: int = 4
    frame_size: int = 32
    frame_rate_hz: float = 0.0
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


@dataclass(frozen=True)
class AudioInput:
    """Audio that an audio network takes where the data settings do not state another length.

    Attributes:
        audio_s: length in seconds.
        max_audio_s: largest length; 0 if there is none.
    """

    audio_s: float = 1.0
    max_audio_s: float = 0.0


class Encoder(nn.Module):
    """Base class of all networks that a tower may have.

    Attributes:
        key: section of the settings, for messages.
        feature_dim: width E of the features.
        supports_segments: whether clips may be shorter than those of training. Event parsing needs this, since it
            encodes single segments.
    """

    key: ClassVar[str]
    supports_segments: bool = False
    feature_dim: int

    @classmethod
    def check(cls, config: Any) -> None:
        """Check the settings of the tower before data is opened.

        Raises:
            UserError: if the network cannot be created with them.
        """

    @classmethod
    def describe(cls, config: Any) -> dict[str, Any]:
        """Return what `model.*.architecture` needs so that the network can be created without its source.

        Raises:
            UserError: if the description cannot be read.
        """
        return {}

    def initial_weights(self, config: Any) -> Mapping[str, Tensor]:
        """Return pretrained weights by the names in the state dict of the network; empty for random ones.

        They are those of the file that `weights` of the tower names, or else the published ones.

        Raises:
            UserError: if they cannot be read.
        """
        if config.weights == "none":
            return {}
        if config.weights:
            weights = read_weights(Path(config.weights).expanduser(), f"{self.key}.weights")
        else:
            weights = self.published_weights(config)
        if not weights:
            return {}
        backbone = self.backbone
        prefixes = [name for name, module in self.named_modules() if module is backbone]
        if not prefixes:
            raise TypeError(f"{type(self).__name__}.backbone has to return this module or one of its submodules.")
        own, prefix = backbone.state_dict(), prefixes[0]
        weights = self.fit_positions(config, self.with_own_names(config, weights, own), own)
        return {f"{prefix}.{name}" if prefix else name: values for name, values in weights.items()}

    def published_weights(self, config: Any) -> Mapping[str, Tensor]:
        """Return the weights that the name of the network selects, by names in the backbone; empty for none.

        Raises:
            UserError: if they are not available here.
        """
        return {}

    def with_own_names(
        self, config: Any, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return weights by the names in the state dict `own` of the backbone, where they have others."""
        return with_names_of(weights, own)

    def fit_positions(self, config: Any, weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights with position embeddings of the size of those in the state dict `own`."""
        return weights

    @property
    def backbone(self) -> nn.Module:
        """The part of the network that freezing and layer-wise learning rates refer to."""
        return self

    def blocks(self) -> list[nn.Module]:
        """Return the parts of the backbone from input to output."""
        return find_blocks(self.backbone)


class VisualEncoder(Encoder):
    """Base class of the networks in `distav.models.towers.VISUAL_TOWERS`.

    A subclass creates its layers in a constructor with the same arguments, sets `feature_dim` there, and defines
    `forward(clip)`: normalized frames [B, 3, T, H, W] in, features [B, E] out. It takes its options from `config`, and
    the shape of the clips from `data`.

    Attributes:
        has_fixed_frame_size: whether all frames must have the size of those of training.
    """

    key = "model.visual"
    has_fixed_frame_size: bool = False

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__()

    @classmethod
    def input_format(cls, config: VisualConfig) -> VisualInput:
        """Return the clips that the network takes by default."""
        return VisualInput()

    @classmethod
    def check_input(cls, config: VisualConfig, data: DataConfig) -> None:
        """Check the shape of the clips.

        Raises:
            UserError: naming the setting of the data and the setting of the network that contradict each other.
        """


class AudioEncoder(Encoder):
    """Base class of the networks in `distav.models.towers.AUDIO_TOWERS`.

    A subclass creates its layers in a constructor with the same arguments, sets `feature_dim` there, and defines
    `forward(mel)`: log-mel spectrograms [B, 1, F, L] in, or what its own front end computes, and features [B, E] out.
    It takes its options from `config`; `num_frames` is L.
    """

    key = "model.audio"

    def __init__(self, config: AudioConfig, num_frames: int):
        super().__init__()

    @classmethod
    def input_format(cls, config: AudioConfig) -> AudioInput:
        """Return the audio that the network takes by default."""
        return AudioInput()

    @classmethod
    def build_front_end(cls, config: AudioConfig, num_samples: int, sample_rate_hz: int) -> FrontEnd:
        """Return what converts audio [B, N] to the input of the network.

        Args:
            config: settings of the tower.
            num_samples: N in training.
            sample_rate_hz: sample rate of the dataset.
        """
        return LogMel(config, sample_rate_hz)
