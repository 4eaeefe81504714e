"""JPEG images of a Motion JPEG clip, cut out of its AVI file by the byte ranges of the index.

An AVI file is a list of chunks, each a four-character name and a length. The chunk `idx1` lists the chunks of frames
inside the list `movi`: name, flags, offset from the word `movi`, and length, four bytes each (Microsoft, AVI RIFF File
Reference).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from distav.data.pipeline.reader import DecodeError

_HEADER = 8
"""Bytes of a chunk's name and length."""


def jpeg_frames(content: bytes, frame_numbers: Sequence[int]) -> list[np.ndarray]:
    """Return the JPEG images of some frames without copying or decoding anything.

    Args:
        content: an AVI file of Motion JPEG video without audio.
        wanted: frame numbers from 0; a number past the end stands for the last frame.

    Returns:
        For each number the bytes of a JPEG image, [bytes] uint8, a view of the content. A frame that the file repeats
        by an empty chunk is the one before it.

    Raises:
        DecodeError: where the file has no index, or the index does not match the chunks.
    """
    index, movi = _index(content)
    shown = np.maximum.accumulate(np.where(index[:, 3] > 0, np.arange(len(index)), -1))
    if shown[0] < 0:
        raise DecodeError("video: the first frame is empty")
    every = np.frombuffer(content, np.uint8)
    images = []
    for number in shown[np.minimum(frame_numbers, len(index) - 1)].tolist():
        name, _, offset, size = index[number].tolist()
        start = movi + offset
        if content[start : start + _HEADER] != name.to_bytes(4, "little") + size.to_bytes(4, "little"):
            raise DecodeError(f"video: frame {number} is not where the index of the AVI file says")
        image = every[start + _HEADER : start + _HEADER + size]
        if len(image) < size:
            raise DecodeError(f"video: frame {number} is truncated: {len(image)} of {size} bytes")
        images.append(image)
    return images


def _index(content: bytes) -> tuple[np.ndarray, int]:
    """Return the rows of the index, [frames, 4] uint32, and the place of the word `movi`."""
    if content[:4] != b"RIFF" or content[8:12] != b"AVI ":
        raise DecodeError("video: no AVI file")
    movi = None
    for name, start, size in _chunks(content):
        if name == b"LIST" and content[start : start + 4] == b"movi":
            movi = start
        if name == b"idx1" and movi is not None:
            rows = np.frombuffer(content[start : start + size], np.uint8)
            rows = rows[: len(rows) // 16 * 16].view("<u4").reshape(-1, 4)
            if not len(rows):
                break
            return rows, movi
    raise DecodeError("video: the AVI file has no index of frames")


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length of the chunks of a file, as far as they lie inside it."""
    place = 12
    while place + _HEADER <= len(content):
        size = int.from_bytes(content[place + 4 : place + _HEADER], "little")
        yield content[place : place + 4], place + _HEADER, size
        place += _HEADER + size + size % 2
