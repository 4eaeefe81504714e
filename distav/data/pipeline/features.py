"""Features of frozen networks, read from `.npy` members: plain numbers of the shape that the set says, or nothing."""

import io
from tokenize import TokenError

import numpy as np

from distav.data.modalities import FeatureStream
from distav.data.pipeline.reader import DecodeError

KINDS = ("<f2", "<f4")
"""float16 and float32."""


def encode_features(values: np.ndarray) -> bytes:
    """Return [steps, dim] as the content of a `.npy` member."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def read_header(content: bytes) -> tuple[tuple[int, ...], str, int]:
    """Return shape and kind of number of a `.npy` file, and where its numbers begin.

    Args:
        content: the file, or as much of its beginning as holds the header.

    Raises:
        DecodeError: where there is none, or numbers are of another kind or order than rows of float16 or float32.
    """
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, kind = read(file)
    except (ValueError, KeyError, SyntaxError, TokenError, EOFError, RecursionError, MemoryError):
        raise DecodeError("no .npy file, or its header is broken") from None
    if kind.str not in KINDS or by_columns:
        raise DecodeError(f"numbers of kind {kind.str}{' by columns' * by_columns}; allowed: float16, float32, by rows")
    return shape, kind.str, file.tell()


def decode_features(content: bytes, stream: FeatureStream) -> np.ndarray:
    """Return the features of a member: [steps, dim] float32.

    Raises:
        DecodeError: for anything but finite numbers of the stream's shape.
    """
    shape, kind, start = read_header(content)
    expected = (stream.steps, stream.dim)
    if shape != expected or len(content) - start != np.dtype(kind).itemsize * stream.steps * stream.dim:
        raise DecodeError(f"features of shape {shape} in {len(content) - start} bytes; expected {expected}")
    values = np.frombuffer(content, kind, offset=start).reshape(expected).astype(np.float32)
    if not np.isfinite(values).all():
        raise DecodeError("features that are not finite")
    return values
