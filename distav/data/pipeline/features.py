"""Features of frozen networks in `.npy` members: float16 or float32 arrays of the shape that the manifest states."""

import io
from tokenize import TokenError

import numpy as np

from distav.data.modalities import FeatureStream
from distav.data.pipeline.reader import DecodeError

DTYPES = ("<f2", "<f4")
"""float16 and float32."""


def encode_features(values: np.ndarray) -> bytes:
    """Return features [steps, dim] as the content of a `.npy` member."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def read_header(content: bytes) -> tuple[tuple[int, ...], str, int]:
    """Return the shape and dtype of a `.npy` file, and the offset of its data in bytes.

    Args:
        content: the file, or at least its header.

    Raises:
        DecodeError: if there is no valid header, or the array is not float16 or float32 in row-major order.
    """
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, column_major, dtype = read(file)
    except (ValueError, KeyError, SyntaxError, TokenError, EOFError, RecursionError, MemoryError):
        raise DecodeError("not a .npy file, or its header is corrupt") from None
    if dtype.str not in DTYPES or column_major:
        order = " in column-major order" if column_major else ""
        raise DecodeError(f"dtype {dtype.str}{order}; allowed: float16 or float32 in row-major order")
    return shape, dtype.str, file.tell()


def decode_features(content: bytes, stream: FeatureStream) -> np.ndarray:
    """Return the features of a member, [steps, dim] float32.

    Raises:
        DecodeError: if the shape is not that of the stream, or if values are not finite.
    """
    shape, dtype, offset = read_header(content)
    expected = (stream.steps, stream.dim)
    if shape != expected or len(content) - offset != np.dtype(dtype).itemsize * stream.steps * stream.dim:
        raise DecodeError(f"features of shape {shape} in {len(content) - offset} bytes; expected {expected}")
    values = np.frombuffer(content, dtype, offset=offset).reshape(expected).astype(np.float32)
    if not np.isfinite(values).all():
        raise DecodeError("features are not finite")
    return values
