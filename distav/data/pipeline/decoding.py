"""Decoding of stored clips on the CPU without DALI: complete clips, or selected frames.

Legend: T frames, H W pixels, N audio samples.
"""

import io
from collections.abc import Sequence

import av
import av.error
import numpy as np
import soundfile

from distav.data.pipeline.reader import DecodeError, Members


def decode_clip(members: Members) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Decode the members of a clip.

    Args:
        members: `video` and `audio` as stored, in any codec of the dataset format; one of them may be missing.

    Returns:
        Frames [T, H, W, 3] uint8 and mono audio [N] float32 in [-1, 1], at the rates of the dataset; None for a missing
        member.

    Raises:
        DecodeError: if both members are missing or one cannot be decoded.
    """
    if not members.keys() & {"video", "audio"}:
        raise DecodeError("no member 'video' or 'audio'; a sample of features has no frames or audio")
    frames = decode_video(members["video"]) if "video" in members else None
    return frames, decode_audio(members["audio"]) if "audio" in members else None


def decode_video(content: bytes) -> np.ndarray:
    """Return all frames of a stored video, [T, H, W, 3] uint8; raises DecodeError."""
    try:
        with av.open(io.BytesIO(content), "r") as container:
            for stream in container.streams.video:
                stream.codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        if not frames:
            raise DecodeError("video: no frame could be decoded")
        return np.stack(frames)
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(f"video: {getattr(error, 'strerror', None) or error}") from None
    except IndexError:
        raise DecodeError("video: no video stream") from None


def decode_frames(content: bytes, frame_numbers: Sequence[int]) -> np.ndarray:
    """Return selected frames of a stored video.

    Args:
        content: the video.
        frame_numbers: ascending frame numbers from 0; a number past the end selects the last selected frame that
            exists.

    Returns:
        [T, H, W, 3] uint8.

    Raises:
        DecodeError: if none of the frames exists.
        av.error.FFmpegError: if the video cannot be decoded.
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
        raise DecodeError("video: no frame could be decoded")
    return np.stack([frames.get(number, frames[max(frames)]) for number in frame_numbers])


def decode_audio(content: bytes) -> np.ndarray:
    """Return stored audio, [N] float32 in [-1, 1]; raises DecodeError."""
    try:
        waveform, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError) as error:
        raise DecodeError(f"audio: {getattr(error, 'error_string', None) or error}") from None
    return waveform.mean(axis=1)
