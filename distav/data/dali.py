"""The one DALI graph that decodes and augments clips, on a GPU ("mixed") or on the CPU.

Legend: B clips, T frames, H W pixels, N audio samples.
"""

import io
from collections.abc import Sequence

import av
import av.error
import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from distav.data.augment import View
from distav.data.format import Split
from distav.data.reader import DecodeError, Members
from distav.settings import DataSettings

CPU_CODECS = ("mjpeg", "vp9")
"""What DALI's video decoder takes on a CPU; PyAV decodes the rest there, ahead of the same graph."""


SMALLEST_ON_GPU = 144
"""Frames with a shorter side are decoded on the CPU, since NVDEC refuses small ones (VP9: below 128 pixels)."""


class ClipGraph:
    """Decodes batches of one size. A failed batch leaves the pipeline invalid, so it is built anew after one."""

    def __init__(self, data: DataSettings, split: Split, batch: int, device: torch.device):
        self.data, self.batch, self.device = data, batch, device
        self.num_audio_samples = round(data.audio_s * split.sample_rate_hz)
        self.on_gpu = device.type == "cuda"
        self.decoded_on_gpu = self.on_gpu and split.shortest_side >= SMALLEST_ON_GPU
        self.decoded_by_pyav = not self.decoded_on_gpu and split.codec not in CPU_CODECS
        self._pipeline = self._build()

    def _build(self) -> Pipeline:
        data = self.data
        pipeline = Pipeline(
            batch_size=self.batch,
            num_threads=data.decode_threads,
            device_id=self.device.index if self.on_gpu else None,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            crop = fn.external_source(name="crop", ndim=1, dtype=types.DALIDataType.FLOAT)
            colour = fn.external_source(name="colour", ndim=1, dtype=types.DALIDataType.FLOAT)
            flip = fn.external_source(name="flip", ndim=0, dtype=types.DALIDataType.INT32)
            if self.decoded_by_pyav:
                frames = fn.external_source(name="video", ndim=4, dtype=types.DALIDataType.UINT8, layout="FHWC")
            else:
                frames = fn.decoders.video(
                    fn.external_source(name="video", ndim=1, dtype=types.DALIDataType.UINT8),
                    device="mixed" if self.decoded_on_gpu else "cpu",
                    start_frame=fn.external_source(name="start_frame", ndim=0, dtype=types.DALIDataType.INT32),
                    sequence_length=data.num_frames,
                    stride=data.frame_stride,
                    pad_mode="edge",
                )
            if self.on_gpu and not self.decoded_on_gpu:
                frames = frames.gpu()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            frames = fn.resize(
                frames,
                roi_start=crop[0:2],
                roi_end=crop[2:4],
                roi_relative=True,
                size=[data.frame_size, data.frame_size],
                interp_type=types.DALIInterpType.INTERP_LINEAR,
                antialias=True,
            )
            frames = fn.color_twist(  # pyright: ignore[reportCallIssue]
                frames,  # pyright: ignore[reportArgumentType]
                brightness=colour[0],
                contrast=colour[1],
                saturation=colour[2],
                hue=colour[3],
            )
            frames = fn.flip(frames, horizontal=flip)
            sound, _ = fn.decoders.audio(
                fn.external_source(name="audio", ndim=1, dtype=types.DALIDataType.UINT8),
                dtype=types.DALIDataType.FLOAT,
                downmix=True,
            )
            start = fn.external_source(name="audio_start", ndim=0, dtype=types.DALIDataType.INT32)
            gain = fn.external_source(name="gain", ndim=0, dtype=types.DALIDataType.FLOAT)
            sound = fn.slice(sound, start, self.num_audio_samples, axes=[0], out_of_bounds_policy="pad") * gain
            pipeline.set_outputs(frames, sound.gpu() if self.on_gpu else sound)
        pipeline.build()
        return pipeline

    def run(self, members: Sequence[Members], views: Sequence[View]) -> dict[str, Tensor]:
        """Decode one batch.

        Args:
            members: B samples as read.
            views: B views.

        Returns:
            `frames` [B, T, H, W, 3] uint8 and `sound` [B, N] float32 in [-1, 1], on the graph's device.

        Raises:
            DecodeError: where any sample of the batch cannot be decoded.
        """
        feed = self._pipeline.feed_input
        try:
            if self.decoded_by_pyav:
                feed("video", [self._frames(each["video"], view) for each, view in zip(members, views, strict=True)])
            else:
                feed("video", [np.frombuffer(each["video"], np.uint8) for each in members])
                feed("start_frame", [np.int32(view.start_frame) for view in views])
            feed("audio", [np.frombuffer(each["audio"], np.uint8) for each in members])
            feed("crop", [view.crop for view in views])
            feed("colour", [view.colour for view in views])
            feed("flip", [np.int32(view.flip) for view in views])
            feed("audio_start", [np.int32(view.audio_start) for view in views])
            feed("gain", [np.float32(view.gain) for view in views])
            frames, sound = (self._tensor(each) for each in self._pipeline.run())
            if self.on_gpu:
                # The next run writes where these copies are taken from, on a stream of its own.
                torch.cuda.current_stream(self.device).synchronize()
            return {"frames": frames, "sound": sound}
        except (RuntimeError, ValueError, IndexError, av.error.FFmpegError) as error:
            self._pipeline = self._build()
            raise DecodeError(str(error).strip().splitlines()[0]) from None

    def _tensor(self, batch: object) -> Tensor:
        """Copy DALI's output, whose memory the next run reuses."""
        if not self.on_gpu:
            return torch.from_numpy(np.array(batch.as_array()))  # pyright: ignore[reportAttributeAccessIssue]
        dense = batch.as_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        return torch.from_dlpack(dense).clone()

    def _frames(self, video: bytes, view: View) -> np.ndarray:
        """Decode the frames of a view by PyAV: [T, H, W, 3] uint8; past the end the last one stands still."""
        wanted = [view.start_frame + number * self.data.frame_stride for number in range(self.data.num_frames)]
        kept: dict[int, np.ndarray] = {}
        with av.open(io.BytesIO(video), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted or number < min(wanted):
                    kept[number] = frame.to_ndarray(format="rgb24") if number in wanted else np.empty(0)
                if number >= wanted[-1]:
                    break
        last = max((number for number in kept if kept[number].size), default=None)
        if last is None:
            raise DecodeError("no frame could be decoded")
        return np.stack([kept[number if number in kept else last] for number in wanted])
