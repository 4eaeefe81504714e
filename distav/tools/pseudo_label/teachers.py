"""Teachers: frozen networks that score how well each segment of a clip matches the caption of each class."""

from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from distav.config.registry import Registry
from distav.data.dataset import Split
from distav.tools.pseudo_label.clap_teacher import CLAPTeacher
from distav.tools.pseudo_label.clip_teacher import CLIPTeacher
from distav.tools.pseudo_label.prompts import Prompts


class Teacher(Protocol):
    """Scores the segments of clips in one modality.

    Attributes:
        modality: `visual` or `audio`.
        frame_size: side in pixels of the frames that a visual teacher takes; 0 for an audio teacher.
    """

    modality: ClassVar[str]
    frame_size: int

    @classmethod
    def from_prompts(cls, prompts: Prompts, split: Split, device: torch.device) -> Self:
        """Load the teacher that scores the clips of a split.

        Raises:
            UserError: if the checkpoint cannot be loaded.
        """
        ...

    def scores(self, media: Tensor) -> Tensor:
        """Return logits [B, T, C] float32 of B clips with T segments for C classes.

        Args:
            media: visual: frames [B, T, H, W, 3] uint8, one per segment; audio: [B, N] float32 in [-1, 1].
        """
        ...


TEACHERS: Registry[type[Teacher]] = Registry(
    "teacher",
    "distav.teachers",
    {
        "clip": CLIPTeacher,
        "clap": CLAPTeacher,
    },
)
"""Teacher classes by the name in the prompts file, `visual.teacher` or `audio.teacher`."""
