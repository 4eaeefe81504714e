"""Stored clips decoded on the CPU, without DALI: whole, as a person sees and hears them, or frame by frame.

Legend: T frames, H W pixels, N audio samples.
"""

import io
from collections.abc import Sequence

import av
import av.error
import numpy as np
import soundfile

from distav.data.pipeline.reader import DecodeError, Members


def decode_clip(members: Members) -> tuple[np.ndarray, np.ndarray]:
    """Decode the members of a clip as they were read from a shard.

    Args:
        members: `video` and `audio`, by any codec of a set.

    Returns:
        Frames [T, H, W, 3] uint8, and sound [N] float32 in [-1, 1], mono, at the set's rates.

    Raises:
        DecodeError: where a member is missing or cannot be decoded, with the reason.
    """
    missing = [name for name in ("video", "audio") if name not in members]
    if missing:
        raise DecodeError(f"no member '{missing[0]}'; features cannot be seen or heard")
    return decode_video(members["video"]), decode_audio(members["audio"])


def decode_video(content: bytes) -> np.ndarray:
    """Return all frames of a stored picture, [T, H, W, 3] uint8, or raise DecodeError."""
    try:
        with av.open(io.BytesIO(content), "r") as container:
            for stream in container.streams.video:
                stream.codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        if not frames:
            raise DecodeError("picture: no frame could be decoded")
        return np.stack(frames)
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(f"picture: {getattr(error, 'strerror', None) or error}") from None
    except IndexError:
        raise DecodeError("picture: no video in it") from None


def decode_frames(content: bytes, frame_numbers: Sequence[int]) -> np.ndarray:
    """Return some frames of a stored video.

    Args:
        content: the video.
        wanted: ascending frame numbers from 0; a number past the end stands for the last of them that is there.

    Returns:
        [T, H, W, 3] uint8.

    Raises:
        DecodeError: where none of the frames is there.
        av.error.FFmpegError: where the video cannot be decoded.
    """
    frames: dict[int, np.ndarray] = {}
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in frame_numbers:
                frames[number] = frame.to_ndarray(format="rgb24")
            if number >= frame_numbers[-1]:
                break
    if not frames:
        raise DecodeError("no frame could be decoded")
    return np.stack([frames.get(number, frames[max(frames)]) for number in frame_numbers])


def decode_audio(content: bytes) -> np.ndarray:
    """Return a stored sound, [N] float32 in [-1, 1], or raise DecodeError."""
    try:
        sound, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError) as error:
        raise DecodeError(f"sound: {getattr(error, 'error_string', None) or error}") from None
    return sound.mean(axis=1)
