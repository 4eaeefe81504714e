"""Extraction of the JPEG images of a Motion JPEG clip from its AVI file, by the byte ranges of the AVI index.

An AVI file is a sequence of chunks, each with a four-character name and a length. The chunk `idx1` lists the chunks of
the frames inside the list `movi`: name, flags, offset from the word `movi`, and length, four bytes each (Microsoft, AVI
RIFF File Reference).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from distav.data.pipeline.reader import DecodeError

_CHUNK_HEADER_BYTES = 8
_INDEX_ENTRY_BYTES = 16


def jpeg_frames(content: bytes, frame_numbers: Sequence[int]) -> list[np.ndarray]:
    """Return the JPEG images of selected frames without copying or decoding them.

    Args:
        content: an AVI file of Motion JPEG video without audio.
        frame_numbers: frame numbers from 0; a number past the end selects the last frame.

    Returns:
        For each number the bytes of a JPEG image, [bytes] uint8, a view of the content. A frame that the file repeats
        by an empty chunk is the previous frame.

    Raises:
        DecodeError: if the file has no index, or if the index does not match the chunks.
    """
    index, movi = _index(content)
    # The last frame up to each position whose chunk is not empty.
    displayed = np.maximum.accumulate(np.where(index[:, 3] > 0, np.arange(len(index)), -1))
    if displayed[0] < 0:
        raise DecodeError("video: the first frame is empty")
    data = np.frombuffer(content, np.uint8)
    images = []
    for number in displayed[np.minimum(frame_numbers, len(index) - 1)].tolist():
        name, _, offset, size = index[number].tolist()
        start = movi + offset
        body = start + _CHUNK_HEADER_BYTES
        if content[start:body] != name.to_bytes(4, "little") + size.to_bytes(4, "little"):
            raise DecodeError(f"video: frame {number} does not start where the AVI index states")
        image = data[body : body + size]
        if len(image) < size:
            raise DecodeError(f"video: frame {number} is truncated: {len(image)} of {size} bytes")
        images.append(image)
    return images


def _index(content: bytes) -> tuple[np.ndarray, int]:
    """Return the rows of the index, [frames, 4] uint32, and the position of the word `movi`."""
    if content[:4] != b"RIFF" or content[8:12] != b"AVI ":
        raise DecodeError("video: not an AVI file")
    movi = None
    for name, start, size in _chunks(content):
        if name == b"LIST" and content[start : start + 4] == b"movi":
            movi = start
        if name == b"idx1" and movi is not None:
            entries = np.frombuffer(content[start : start + size], np.uint8)
            entries = entries[: len(entries) // _INDEX_ENTRY_BYTES * _INDEX_ENTRY_BYTES].view("<u4").reshape(-1, 4)
            if not len(entries):
                break
            return entries, movi
    raise DecodeError("video: the AVI file has no index of frames")


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length of the chunks whose header is inside the file."""
    position = 12
    while position + _CHUNK_HEADER_BYTES <= len(content):
        size = int.from_bytes(content[position + 4 : position + _CHUNK_HEADER_BYTES], "little")
        yield content[position : position + 4], position + _CHUNK_HEADER_BYTES, size
        position += _CHUNK_HEADER_BYTES + size + size % 2
