"""Decoding and augmentation of clips by DALI, on a GPU or on the CPU.

Legend: B clips, T frames, H W pixels, S side of the output in pixels, N audio samples.
"""

import itertools
import logging
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
from distav.data.pipeline.crop_bands import crop_bands
from distav.data.pipeline.dali_errors import DeviceError, dali_reason, is_device_failure, is_out_of_memory
from distav.data.pipeline.decoder_selection import Decoder, Route, select_decoder
from distav.data.pipeline.decoding import decode_frames
from distav.data.pipeline.reader import DecodeError, Members

log = logging.getLogger("distav")

_NVDEC_TEST_CLIPS = 3
"""Clips on which NVDEC is tested before it is used."""
_FLOAT, _INT32, _UINT8 = types.DALIDataType.FLOAT, types.DALIDataType.INT32, types.DALIDataType.UINT8


class ClipPipeline:
    """Decodes batches of clips and applies their transforms.

    Args:
        data: number, stride and size of frames, and length of the audio.
        split: the split of the clips.
        batch: largest batch.
        device: device of the outputs; decoding uses the GPU if it is one.
    """

    def __init__(self, data: DataConfig, split: Split, batch: int, device: torch.device):
        self.data, self.split, self.batch, self.device = data, split, batch, device
        self.num_audio_samples = round(data.audio_s * split.sample_rate_hz)
        self.on_gpu = device.type == "cuda"
        self.route = select_decoder(split.codec, self.on_gpu, split.sides)
        self.shapes = {
            "frames": ((data.num_frames, data.frame_size, data.frame_size, 3), torch.uint8),
            "audio": ((self.num_audio_samples,), torch.float32),
        }
        """Shape and dtype of one sample of each output."""
        self._nvdec_tested = not (self.route.decoder is Decoder.video and self.route.on_gpu)
        self._pipelines: dict[str, Pipeline] = {}
        # With a GPU, decoding may use all of this rank's cores; on a CPU, training uses them.
        self._threads = data.decode_threads or (torch.get_num_threads() if self.on_gpu else 1)
        self._pool = ThreadPoolExecutor(self._threads, "decoder")

    @property
    def _decodes_bands(self) -> bool:
        """Whether only the pixel rows that a crop needs are decoded.

        nvJPEG before CUDA 13.3 refuses regions with fancy upsampling, without which its colors differ from libjpeg's,
        and DALI would then decode on the CPU.
        """
        return self.route == Route(Decoder.jpeg, False)

    def run(self, members: Sequence[Members], transforms: Sequence[ClipTransform]) -> dict[str, Tensor]:
        """Decode a batch.

        Args:
            members: members of up to B clips, as stored; `video` or `audio` may be missing.
            transforms: transform of each clip.

        Returns:
            `frames` [B, T, S, S, 3] uint8 and `audio` [B, N] float32 in [-1, 1], on the device of the pipeline; on a
            GPU, in its current stream. Where a member is missing, a row is zero.

        Raises:
            DecodeError: if any clip of the batch cannot be decoded.
            DeviceError: if the device failed.
        """
        try:
            if not self._nvdec_tested:
                self._test_nvdec(members, transforms)
            return {
                "frames": self._decode_existing("frames", "video", self._decode_frames, members, transforms),
                "audio": self._decode_existing("audio", "audio", self._decode_audio, members, transforms),
            }
        except (ValueError, IndexError, av.error.FFmpegError) as error:
            raise DecodeError(dali_reason(str(error))) from None

    def _decode_existing(
        self,
        output: str,
        member: str,
        decode: Callable[[Sequence[bytes], Sequence[ClipTransform]], Tensor],
        members: Sequence[Members],
        transforms: Sequence[ClipTransform],
    ) -> Tensor:
        """Return an output for all clips; the rows of those without the member are zero.

        Repeating other rows instead would make batch statistics depend on how a batch is divided among ranks.
        """
        rows = [row for row, clip in enumerate(members) if member in clip]
        if len(rows) == len(members):
            return decode([clip[member] for clip in members], transforms)
        shape, dtype = self.shapes[output]
        media = torch.zeros(len(members), *shape, dtype=dtype, device=self.device)
        if rows:
            media[rows] = decode([members[row][member] for row in rows], [transforms[row] for row in rows])
        return media

    def _test_nvdec(self, members: Sequence[Members], transforms: Sequence[ClipTransform]) -> None:
        """Decode a few clips; if NVDEC decodes none of those that FFmpeg decodes, switch to decoding on the CPU."""
        reason = ""
        clips = [
            (clip["video"], transform) for clip, transform in zip(members, transforms, strict=True) if "video" in clip
        ]
        if not clips:
            return
        for video, transform in clips[:_NVDEC_TEST_CLIPS]:
            try:
                self._decode_frames([video], [transform])
                break
            except (DecodeError, DeviceError) as error:
                if is_out_of_memory(str(error)):
                    raise
                reason = str(error)
                decode_frames(video, self._frame_numbers(transform))
        else:
            self.route = select_decoder(self.split.codec, False, self.split.sides)
            log.warning(
                f"NVDEC cannot decode the {self.split.codec} clips of {self.split.root} ({reason}); decoding them on "
                "the CPU, which is slower. In a container, NVIDIA_DRIVER_CAPABILITIES must include video."
            )
        self._nvdec_tested = True

    def _decode_frames(self, videos: Sequence[bytes], transforms: Sequence[ClipTransform]) -> Tensor:
        """Return augmented frames, [B, T, S, S, 3] uint8."""
        inputs = self._frame_inputs(videos, transforms)
        colors = np.stack([transform.color for transform in transforms])
        if self.on_gpu:
            inputs["color"] = np.repeat(colors, len(inputs["flip"]) // len(transforms), axis=0)
        frames = self._run("frames", self._frame_graph, inputs).view(len(videos), *self.shapes["frames"][0])
        if not self.on_gpu:
            frame_parts = np.array_split(frames.numpy(), self._threads)
            list(self._pool.map(change_colors, frame_parts, np.array_split(colors, self._threads)))
        return frames

    def _frame_inputs(self, videos: Sequence[bytes], transforms: Sequence[ClipTransform]) -> dict[str, Any]:
        """Return the inputs of the frame graph, one row per clip, or per frame for the image decoder."""
        num_frames = self.data.num_frames
        crops = np.stack([transform.crop for transform in transforms])
        flips = np.array([transform.flip for transform in transforms], np.int32)
        if self.route.decoder is Decoder.jpeg:
            images = map(jpeg_frames, videos, map(self._frame_numbers, transforms))
            inputs: dict[str, Any] = {"video": list(itertools.chain.from_iterable(images))}
            if self._decodes_bands:
                bands, crops = crop_bands(transforms, crops, self.data.frame_size)
                inputs["band"] = np.repeat(bands, num_frames, axis=0)
            return inputs | {"crop": np.repeat(crops, num_frames, axis=0), "flip": np.repeat(flips, num_frames)}
        if self.route.decoder is Decoder.pyav:
            decoded = self._pool.map(decode_frames, videos, map(self._frame_numbers, transforms))
            return {"video": list(decoded), "crop": crops, "flip": flips}
        return {
            "video": [np.frombuffer(video, np.uint8) for video in videos],
            "crop": crops,
            "flip": flips,
            "start_frame": np.array([transform.start_frame for transform in transforms], np.int32),
        }

    def _decode_audio(self, contents: Sequence[bytes], transforms: Sequence[ClipTransform]) -> Tensor:
        """Return the audio of each transform, [B, N] float32; silence before and after the clip."""
        inputs = {
            "audio": [np.frombuffer(content, np.uint8) for content in contents],
            "start": np.array([transform.audio_start for transform in transforms], np.int32),
            "gain": np.array([transform.gain for transform in transforms], np.float32),
        }
        return self._run("audio", self._audio_graph, inputs)

    def _frame_graph(self) -> Any:
        """Define decoding, cropping, resizing, color change (on a GPU) and flipping."""
        size, crop = self.data.frame_size, fn.external_source(name="crop", ndim=1, dtype=_FLOAT)
        frames = fn.resize(
            self._decoding_graph(),
            roi_start=crop[0:2],
            roi_end=crop[2:4],
            roi_relative=not self._decodes_bands,
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

    def _decoding_graph(self) -> Any:
        """Define the decoded frames, on the device of the outputs."""
        route, backend = self.route, "mixed" if self.route.on_gpu else "cpu"
        if route.decoder is Decoder.pyav:
            frames: Any = fn.external_source(name="video", ndim=4, dtype=_UINT8, layout="FHWC")
        elif route.decoder is Decoder.jpeg:
            images = fn.external_source(name="video", ndim=1, dtype=_UINT8)
            if self._decodes_bands:
                band = fn.external_source(name="band", ndim=1, dtype=_INT32)
                frames = fn.decoders.image_slice(
                    images, start=band[0:1], end=band[1:2], axis_names="H", jpeg_fancy_upsampling=True
                )
            else:
                frames = fn.decoders.image(images, device=backend, jpeg_fancy_upsampling=True)
        else:
            frames = fn.decoders.video(
                fn.external_source(name="video", ndim=1, dtype=_UINT8),
                device=backend,
                start_frame=fn.external_source(name="start_frame", ndim=0, dtype=_INT32),
                sequence_length=self.data.num_frames,
                stride=self.data.frame_stride,
                pad_mode="edge",
            )
        return frames.gpu() if self.on_gpu and not route.on_gpu else frames

    def _audio_graph(self) -> Any:
        """Define decoding, slicing and gain of the audio."""
        content = fn.external_source(name="audio", ndim=1, dtype=_UINT8)
        waveform, _ = fn.decoders.audio(content, dtype=_FLOAT, downmix=True)
        start = fn.external_source(name="start", ndim=0, dtype=_INT32)
        gain = fn.external_source(name="gain", ndim=0, dtype=_FLOAT)
        waveform = fn.slice(waveform, start, self.num_audio_samples, axes=[0], out_of_bounds_policy="pad") * gain
        return waveform.gpu() if self.on_gpu else waveform

    def _run(self, name: str, graph: Callable[[], Any], inputs: Mapping[str, Any]) -> Tensor:
        """Run a DALI pipeline; builds it on first use and after a failure, which invalidates it."""
        try:
            if name not in self._pipelines:
                per_frame = name == "frames" and self.route.decoder is Decoder.jpeg
                self._pipelines[name] = self._build(graph, self.batch * (self.data.num_frames if per_frame else 1))
            pipeline = self._pipelines[name]
            for source, values in inputs.items():
                pipeline.feed_input(source, values)
            return self._to_tensor(pipeline.run()[0])
        except Exception as error:
            self._pipelines.pop(name, None)
            reason = dali_reason(str(error))
            if is_device_failure(reason, self.device):
                advice = "check nvidia-smi and rerun the same command to resume"
                if is_out_of_memory(reason):
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

    def _to_tensor(self, output: Any) -> Tensor:
        """Copy DALI's output, because the next run reuses its memory."""
        if not self.on_gpu:
            return torch.from_numpy(output.as_array())  # `as_array` copies.
        copy = torch.from_dlpack(output.as_tensor()).clone()
        torch.cuda.current_stream(self.device).synchronize()  # DALI's next run uses another stream.
        return copy

    def _frame_numbers(self, transform: ClipTransform) -> list[int]:
        return [transform.start_frame + number * self.data.frame_stride for number in range(self.data.num_frames)]
