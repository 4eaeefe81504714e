"""Selection of the video decoder.

| codec | on a CPU | on a GPU |
|---|---|---|
| MJPEG | `jpeg`: libjpeg-turbo | `jpeg`: nvJPEG |
| VP9 | `video`: FFmpeg inside DALI | `video`: NVDEC, or as on a CPU if NVDEC does not support the frame size |
| H.264 | `pyav`: FFmpeg inside PyAV | `video`: NVDEC, or as on a CPU if NVDEC does not support the frame size |
"""

from dataclasses import dataclass
from enum import Enum

NVDEC_SIDES = (144, 4096)
"""Shortest and longest side in pixels that NVDEC decodes for both VP9 (from 128) and H.264 (up to 4096)."""


class Decoder(Enum):
    """Decoder of the video of a clip."""

    jpeg = "jpeg"
    """DALI's image decoder, frame by frame."""
    video = "video"
    """DALI's video decoder."""
    pyav = "pyav"
    """PyAV on the CPU, before the DALI pipeline."""


@dataclass(frozen=True)
class Route:
    """A decoder, and whether it runs on a GPU."""

    decoder: Decoder
    on_gpu: bool


def select_decoder(codec: str, on_gpu: bool, sides: tuple[int, int]) -> Route:
    """Return the decoder for the video of a dataset.

    Args:
        codec: mjpeg, vp9 or h264.
        on_gpu: whether a GPU is available for decoding.
        sides: shortest and longest side of all frames, in pixels.
    """
    if codec == "mjpeg":
        return Route(Decoder.jpeg, on_gpu)
    if on_gpu and NVDEC_SIDES[0] <= sides[0] and sides[1] <= NVDEC_SIDES[1]:
        return Route(Decoder.video, True)
    return Route(Decoder.video if codec == "vp9" else Decoder.pyav, False)
