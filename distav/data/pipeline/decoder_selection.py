"""Which decoder serves the video of a dataset.

| codec | on a CPU | on a GPU |
|---|---|---|
| MJPEG | `jpeg`: libjpeg-turbo | `jpeg`: nvJPEG |
| VP9 | `video`: FFmpeg inside DALI | `video`: NVDEC, or as on a CPU where NVDEC does not take the size |
| H.264 | `pyav`: FFmpeg inside PyAV | `video`: NVDEC, or as on a CPU where NVDEC does not take the size |
"""

from dataclasses import dataclass
from enum import Enum

NVDEC_SIDES = (144, 4096)
"""Shortest and longest side in pixels that NVDEC decodes of VP9 (from 128) and H.264 (up to 4096) alike."""


class Decoder(Enum):
    """What decodes the video of a clip."""

    jpeg = "jpeg"
    """DALI's image decoder, frame by frame."""
    video = "video"
    """DALI's video decoder."""
    pyav = "pyav"
    """PyAV, on the CPU, ahead of the graph."""


@dataclass(frozen=True)
class Route:
    """How video is decoded, and whether a GPU does it."""

    decoder: Decoder
    on_gpu: bool


def select_decoder(codec: str, on_gpu: bool, sides: tuple[int, int]) -> Route:
    """Return how video of a codec is decoded.

    Args:
        codec: mjpeg, vp9 or h264.
        on_gpu: whether there is a GPU to decode on.
        sides: shortest and longest side of any frame in pixels.
    """
    if codec == "mjpeg":
        return Route(Decoder.jpeg, on_gpu)
    if on_gpu and NVDEC_SIDES[0] <= sides[0] and sides[1] <= NVDEC_SIDES[1]:
        return Route(Decoder.video, True)
    return Route(Decoder.video if codec == "vp9" else Decoder.pyav, False)
