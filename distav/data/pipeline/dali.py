"""Clips decoded and augmented by DALI, on a GPU or on the CPU.

Legend: B clips, T frames, H W pixels, S side of the output in pixels, N audio samples.
"""

import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import av.error
import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from distav.config.schema import DataConfig
from distav.data.dataset import Split
from distav.data.pipeline.augmentation import ClipTransform
from distav.data.pipeline.avi import jpeg_frames
from distav.data.pipeline.color import change_colors
from distav.data.pipeline.decoder_selection import Decoder, select_decoder
from distav.data.pipeline.decoding import decode_frames
from distav.data.pipeline.reader import DecodeError, Members

log = logging.getLogger("distav")

_TRIED = 3
"""Clips that NVDEC is tried on."""
_FLOAT, _INT32, _UINT8 = types.DALIDataType.FLOAT, types.DALIDataType.INT32, types.DALIDataType.UINT8


class DeviceError(RuntimeError):
    """The device failed while it decoded a batch; no clip is to blame."""


class ClipPipeline:
    """Decodes batches of clips and applies their views."""

    def __init__(self, data: DataConfig, split: Split, batch: int, device: torch.device):
        """Prepare for batches of up to B clips of one split."""
        self.data, self.split, self.batch, self.device = data, split, batch, device
        self.num_audio_samples = round(data.audio_s * split.sample_rate_hz)
        self.on_gpu = device.type == "cuda"
        self.route = select_decoder(split.codec, self.on_gpu, split.sides)
        self.shapes = {
            "frames": ((data.num_frames, data.frame_size, data.frame_size, 3), torch.uint8),
            "audio": ((self.num_audio_samples,), torch.float32),
        }
        """Shape and dtype of a sample of each output."""
        self._nvdec_tried = not (self.route.decoder is Decoder.video and self.route.on_gpu)
        self._pipelines: dict[str, Pipeline] = {}
        # On a GPU training leaves this process's threads to decoding; their number is the rank's share of the cores.
        self._threads = data.decode_threads or (torch.get_num_threads() if self.on_gpu else 1)
        self._pool = ThreadPoolExecutor(self._threads, "decoder")

    def run(self, members: Sequence[Members], views: Sequence[ClipTransform]) -> dict[str, Tensor]:
        """Decode a batch.

        Args:
            members: up to B samples as read.
            views: a view of each.

        Returns:
            `frames` [B, T, S, S, 3] uint8 and `sound` [B, N] float32 in [-1, 1], on the graph's device; the work on a
            GPU is in its current stream.

        Raises:
            DecodeError: where any sample of the batch cannot be decoded.
            DeviceError: where the device failed.
        """
        try:
            if not self._nvdec_tried:
                self._try_nvdec(members[:_TRIED], views[:_TRIED])
            frames = self._frames([each["video"] for each in members], views)
            return {"frames": frames, "audio": self._sound([each["audio"] for each in members], views)}
        except (ValueError, IndexError, av.error.FFmpegError) as error:
            raise DecodeError(dali_reason(str(error))) from None

    def _try_nvdec(self, members: Sequence[Members], views: Sequence[ClipTransform]) -> None:
        """Decode a few clips; where NVDEC decodes none that FFmpeg decodes, FFmpeg decodes all from now on."""
        reason = ""
        for member, view in zip(members, views, strict=True):
            try:
                self._frames([member["video"]], [view])
                break
            except (DecodeError, DeviceError) as error:
                if _out_of_memory(str(error)):
                    raise
                reason = str(error)
                decode_frames(member["video"], self._wanted(view))
        else:
            self.route = select_decoder(self.split.codec, False, self.split.sides)
            log.warning(
                f"NVDEC does not decode the {self.split.codec} clips of {self.split.root} ({reason}), so they are "
                "decoded on the CPU, which is slower. In a container, set NVIDIA_DRIVER_CAPABILITIES to include video."
            )
        self._nvdec_tried = True

    def _frames(self, videos: Sequence[bytes], views: Sequence[ClipTransform]) -> Tensor:
        """Return augmented frames: [B, T, S, S, 3] uint8."""
        decoder, num_frames = self.route.decoder, self.data.num_frames
        crops = np.stack([view.crop for view in views])
        colors = np.stack([view.color for view in views])
        flips = np.array([view.flip for view in views], np.int32)
        if decoder is Decoder.jpeg:
            bands, crops = _bands(views, crops, self.data.frame_size)
            images = [jpeg_frames(video, self._wanted(view)) for video, view in zip(videos, views, strict=True)]
            fed: dict[str, Any] = {"video": list(itertools.chain.from_iterable(images))}
            fed |= {"band": np.repeat(bands, num_frames, axis=0), "crop": np.repeat(crops, num_frames, axis=0)}
            fed |= {"flip": np.repeat(flips, num_frames)}
        elif decoder is Decoder.pyav:
            fed = {
                "video": list(self._pool.map(decode_frames, videos, map(self._wanted, views))),
                "crop": crops,
                "flip": flips,
            }
        else:
            fed = {"video": [np.frombuffer(each, np.uint8) for each in videos], "crop": crops, "flip": flips}
            fed |= {"start_frame": np.array([view.start_frame for view in views], np.int32)}
        if self.on_gpu:
            fed["color"] = np.repeat(colors, len(fed["flip"]) // len(views), axis=0)
        frames = self._run("frames", self._frame_graph, fed).view(len(videos), *self.shapes["frames"][0])
        if not self.on_gpu:
            parts = zip(*(np.array_split(each, self._threads) for each in (frames.numpy(), colors)), strict=True)
            list(self._pool.map(lambda part: change_colors(*part), parts))
        return frames

    def _sound(self, contents: Sequence[bytes], views: Sequence[ClipTransform]) -> Tensor:
        """Return the audio of each view: [B, N] float32, silence past either end of a clip."""
        fed = {
            "audio": [np.frombuffer(each, np.uint8) for each in contents],
            "start": np.array([view.audio_start for view in views], np.int32),
            "gain": np.array([view.gain for view in views], np.float32),
        }
        return self._run("audio", self._sound_graph, fed)

    def _frame_graph(self) -> Any:
        size, crop = self.data.frame_size, fn.external_source(name="crop", ndim=1, dtype=_FLOAT)
        route, backend = self.route, "mixed" if self.route.on_gpu else "cpu"
        if route.decoder is Decoder.pyav:
            frames = fn.external_source(name="video", ndim=4, dtype=_UINT8, layout="FHWC")
        else:
            content = fn.external_source(name="video", ndim=1, dtype=_UINT8)
            if route.decoder is Decoder.jpeg:
                band = fn.external_source(name="band", ndim=1, dtype=_INT32)
                frames = fn.decoders.image_slice(
                    content,
                    device=backend,
                    start=band[0:1],
                    end=band[1:2],
                    axis_names="H",
                    jpeg_fancy_upsampling=True,
                )
            else:
                frames = fn.decoders.video(
                    content,
                    device=backend,
                    start_frame=fn.external_source(name="start_frame", ndim=0, dtype=_INT32),
                    sequence_length=self.data.num_frames,
                    stride=self.data.frame_stride,
                    pad_mode="edge",
                )
        if self.on_gpu and not route.on_gpu:
            frames = frames.gpu()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        frames = fn.resize(
            frames,
            roi_start=crop[0:2],
            roi_end=crop[2:4],
            roi_relative=route.decoder is not Decoder.jpeg,
            size=[size, size],
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=True,
        )
        if self.on_gpu:
            color = fn.external_source(name="color", ndim=1, dtype=_FLOAT)
            frames = fn.color_twist(  # pyright: ignore[reportCallIssue]
                frames,  # pyright: ignore[reportArgumentType]
                brightness=color[0],
                contrast=color[1],
                saturation=color[2],
                hue=color[3],
            )
        flip = fn.external_source(name="flip", ndim=0, dtype=_INT32)
        return fn.flip(frames, horizontal=flip)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _sound_graph(self) -> Any:
        content = fn.external_source(name="audio", ndim=1, dtype=_UINT8)
        sound, _ = fn.decoders.audio(content, dtype=_FLOAT, downmix=True)
        start = fn.external_source(name="start", ndim=0, dtype=_INT32)
        gain = fn.external_source(name="gain", ndim=0, dtype=_FLOAT)
        sound = fn.slice(sound, start, self.num_audio_samples, axes=[0], out_of_bounds_policy="pad") * gain
        return sound.gpu() if self.on_gpu else sound

    def _run(self, name: str, graph: Callable[[], Any], fed: Mapping[str, Any]) -> Tensor:
        """Run a pipeline, building it where there is none; one that failed is not valid any more."""
        try:
            if name not in self._pipelines:
                flattened = name == "frames" and self.route.decoder is Decoder.jpeg
                self._pipelines[name] = self._build(graph, self.batch * (self.data.num_frames if flattened else 1))
            pipeline = self._pipelines[name]
            for source, values in fed.items():
                pipeline.feed_input(source, values)
            return self._tensor(pipeline.run()[0])
        except Exception as error:
            self._pipelines.pop(name, None)
            reason = dali_reason(str(error))
            if self._is_device_fault(reason):
                advice = "look at nvidia-smi and give the same command again"
                if _out_of_memory(reason):
                    advice = "lower optim.global_batch or raise optim.gradient_accumulation_steps"
                raise DeviceError(f"decoding on {self.device} failed: {reason}; {advice}.") from None
            if isinstance(error, RuntimeError | ValueError | IndexError):
                raise DecodeError(reason) from None
            raise

    def _build(self, graph: Callable[[], Any], batch: int) -> Pipeline:
        pipeline = Pipeline(
            batch_size=batch,
            num_threads=self._threads,
            device_id=self.device.index if self.on_gpu else None,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            pipeline.set_outputs(graph())
        pipeline.build()
        return pipeline

    def _tensor(self, output: Any) -> Tensor:
        """Copy DALI's output, whose memory the next run reuses."""
        if not self.on_gpu:
            return torch.from_numpy(output.as_array())  # A copy already.
        copy = torch.from_dlpack(output.as_tensor()).clone()
        torch.cuda.current_stream(self.device).synchronize()  # DALI's next run is in a stream of its own.
        return copy

    def _is_device_fault(self, reason: str) -> bool:
        """Whether a failure is the device's: out of memory, or one after which a GPU does not answer."""
        if _out_of_memory(reason):
            return True
        if not self.on_gpu or "libnvcuvid" in reason:
            return bool(re.search(r"CUDA|cuda[A-Z]|libnvcuvid|libcuda", reason))
        try:
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError:
            return True
        return False

    def _wanted(self, view: ClipTransform) -> list[int]:
        return [view.start_frame + number * self.data.frame_stride for number in range(self.data.num_frames)]


def _bands(views: Sequence[ClipTransform], crops: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of pixels that the crops need, and the crops in pixels of the decoded bands.

    A JPEG image is coded row by row: decoding fewer columns saves nothing. The margin is what the antialiasing filter
    reads beyond a crop.

    Args:
        views: B views.
        crops: [B, 4] top, left, bottom, right as fractions of height and width.
        size: S.

    Returns:
        [B, 2] int32 first row and the row after the last, and [B, 4] float32.
    """
    height, width = np.array([view.size for view in views]).T
    top, left, bottom, right = (crops * np.stack([height, width, height, width], axis=1)).T
    margin = np.maximum(1, (bottom - top) / size) + 2
    first = np.maximum(0, np.floor(top - margin))
    last = np.minimum(height, np.ceil(bottom + margin))
    bands = np.stack([first, last], axis=1).astype(np.int32)
    return bands, np.stack([top - first, left, bottom - first, right], axis=1).astype(np.float32)


def dali_reason(message: str) -> str:
    """Return what happened from a message of DALI: the first line after "encountered:"."""
    said = message.partition("encountered:")[2] or message
    lines = [line.strip() for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Critical error in pipeline", "Current pipeline"))]
    return lines[0] if lines else "the decoder gave no reason"


def _out_of_memory(reason: str) -> bool:
    return bool(
        re.search(
            r"out of memory|allocation failed|OUT_OF_MEMORY|MemoryAllocation|bad_alloc|nvImageCodec failure: '#5'",
            reason,
        )
    )
