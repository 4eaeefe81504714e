"""Everything besides the source that determines the bytes of a dataset."""

from dataclasses import dataclass, field

from distav.config.errors import UserError
from distav.data.preparation.encoding import OMIT_DEFAULT, Encoding
from distav.data.preparation.multi_label_noise import ClassRates
from distav.data.preparation.noise_injection import LabelNoise


@dataclass(frozen=True)
class BuildConfig:
    """Everything besides the source that determines the bytes of a dataset.

    Attributes:
        encoding: how clips are stored.
        seed: seed of order, noise and rendering.
        shard_samples: samples per shard.
        label_noise: label noise of the training split; None: none.
        correspondence_noise: fraction of training clips with the audio of another clip, among those with both
            modalities.
        cross_class_only: whether audio is swapped only between clips of different classes.
        missing_labels: fraction of missing labels of each class in the training split of a multi-label source.
        wrong_labels: fraction of the clips without a class that get its label, likewise.
    """

    encoding: Encoding
    seed: int = 0
    shard_samples: int = 1000
    label_noise: LabelNoise | None = None
    correspondence_noise: float = 0.0
    cross_class_only: bool = False
    missing_labels: ClassRates | None = field(default=None, metadata={OMIT_DEFAULT: True})
    wrong_labels: ClassRates | None = field(default=None, metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if self.shard_samples < 1:
            raise UserError(f"--shard-samples={self.shard_samples}: has to be 1 or more.")
        if not 0 <= self.correspondence_noise <= 1:
            raise UserError(f"--correspondence-noise={self.correspondence_noise}: has to be a rate from 0 to 1.")

    @property
    def corrupts_lists(self) -> bool:
        """Whether label lists get missing or wrong labels."""
        return self.missing_labels is not None or self.wrong_labels is not None
