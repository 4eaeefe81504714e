"""Data loading end to end, compared with its slowest stage alone and with webdataset and PyAV in a DataLoader."""

import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import ShardedDataset, Split
from distav.data.manifest import VIDEO_EXTENSIONS
from distav.data.pipeline.augmentation import ClipTransformSampler
from distav.data.pipeline.dali import ClipPipeline
from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.reader import ShardReader
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.synthetic import SyntheticSource
from tools.bench.timing import Results, Setting

FRAMES, STRIDE, AUDIO_S = 8, 2, 1.0
SIDES = {"cpu": (128, 112), "cuda": (256, 224)}
"""Pixels of the short side of stored frames and of the model's frames; NVDEC requires at least 144."""
STEP_OVER_LOADER = 1.25
"""Duration of the simulated training step, relative to the loader's time per batch."""


def make_clips(directory: Path, clips: int, codec: str = "mjpeg", short_side: int = 128) -> Split:
    """Render a dataset of two-second clips of 16 frames."""
    build_dataset(
        SyntheticSource(train_clips=clips, test_clips=1),
        directory,
        BuildConfig(Encoding(codec, fps=8, short_side=short_side, clip_s=2.0)),
        workers=torch.get_num_threads(),
    )
    return ShardedDataset.open(directory).split("train")


def run(setting: Setting, clips: int, batch: int, codec: str = "mjpeg") -> Results:
    """Measure the loader in wall time.

    Args:
        setting: device, threads, rounds.
        clips: number of clips.
        batch: clips per batch.
        codec: codec of the clips.
    """
    arguments = {"clips": clips, "batch": batch, "threads": setting.threads, "device": setting.device.type}
    stored, size = SIDES[setting.device.type]
    results = Results("loader", arguments | {"frames": f"{FRAMES} of 16, {stored} px {codec} -> {size} px"})
    setting = Setting(setting.device, max(2, setting.threads), setting.rounds)  # one thread would select CPU time
    data = DataConfig(num_frames=FRAMES, frame_stride=STRIDE, frame_size=size, audio_s=AUDIO_S)
    data.decode_threads = setting.threads
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as directory:
        split = make_clips(Path(directory) / "dataset", clips, codec, stored)
        num_batches = len(split) // batch
        plan = [(ids, 0) for ids in np.arange(num_batches * batch).reshape(num_batches, batch)]
        loader = Loader(split, data, AugmentConfig(), 0, batch, setting.device)
        stages = _Stages(split, data, plan, setting.device)
        peers = {
            name: _webdataset(split, batch, decoder, setting.threads, size) for name, decoder in _decoders().items()
        }
        candidates = {
            "reading and checking alone": stages.read,
            "decoding and augmenting alone": stages.decode,
            "loader": lambda: [None for _ in loader.batches(plan)],
        }
        candidates |= {
            f"webdataset + {name} in a DataLoader": lambda batches=batches: _exhaust(batches)
            for name, batches in peers.items()
        }
        seconds = setting.interleaved(candidates)
        results.add_times(seconds, {candidate: (num_batches * batch, "clips/s") for candidate in seconds})
        ours = seconds["loader"]
        stage_seconds = seconds["reading and checking alone"], seconds["decoding and augmenting alone"]
        slowest = [max(pair) for pair in zip(*stage_seconds, strict=True)]
        results.add_ratio("clips/s, loader / its slowest stage", (slowest, ours), ">= 0.9")
        for name in peers:
            peer = seconds[f"webdataset + {name} in a DataLoader"]
            threshold = {"PyAV": ">= 1.3", "torchcodec": ">= 1"}[name] if codec == "mjpeg" else ""
            results.add_ratio(f"clips/s, loader / webdataset + {name}", (peer, ours), threshold)
        step = _simulated_step(setting.device, STEP_OVER_LOADER * float(np.median(ours)) / num_batches)
        wait = _data_wait(loader, plan * 2, step)
        results.add_ratio("data wait, fraction of a step of 1.25 batch times", wait, "<= 0.02")
        loader.close()
    return results


class _Stages:
    """The two stages of the loader, each with its input in memory."""

    def __init__(self, split: Split, data: DataConfig, plan: list, device: torch.device):
        self.plan = plan
        self.reader = ShardReader(split)
        self.pipeline = ClipPipeline(data, split, len(plan[0][0]), device)
        sampler = ClipTransformSampler(split, data, AugmentConfig(), 0)
        self.transforms = [[sampler.sample(int(sample), epoch) for sample in ids] for ids, epoch in plan]
        self.members = [[self.reader.read(int(sample)) for sample in ids] for ids, _ in plan]

    def read(self) -> None:
        for ids, _ in self.plan:
            for sample in ids:
                self.reader.read(int(sample))

    def decode(self) -> None:
        for members, transforms in zip(self.members, self.transforms, strict=True):
            self.pipeline.run(members, transforms)


def _simulated_step(device: torch.device, seconds: float) -> Callable[[], None]:
    """Return a function that takes as long as a training step and leaves the CPU to the loader.

    On a GPU it enqueues matrix products, which reveals a loader that synchronizes with the GPU.
    """
    if device.type == "cpu":
        return lambda: time.sleep(seconds)
    factor = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(factor)

    def multiply(repetitions: int) -> None:
        for _ in range(repetitions):
            torch.mm(factor, factor, out=product)

    multiply(20)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    multiply(200)
    torch.cuda.synchronize(device)
    repetitions = max(1, round(200 * seconds / (time.perf_counter() - started)))
    return lambda: multiply(repetitions)


def _data_wait(loader: Loader, plan: list, step: Callable[[], None]) -> float:
    """Return the fraction of a step spent waiting for data, compared with steps on a batch in memory."""

    def run_steps(batches: Iterator[Batch]) -> float:
        next(batches)
        started = time.perf_counter()
        for _ in range(len(plan) - 1):
            step()
            next(batches)
        if loader.device.type == "cuda":
            torch.cuda.synchronize(loader.device)
        return time.perf_counter() - started

    cached = next(iter(loader.batches(plan[:1])))
    real, ideal = run_steps(loader.batches(plan)), run_steps(iter([cached] * len(plan)))
    return max(0.0, (real - ideal) / real)


def _decoders() -> dict[str, str]:
    """Return the decoders to compare with; torchcodec requires FFmpeg's libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        print(f"torchcodec is not measured: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return {"PyAV": "pyav"}
    return {"PyAV": "pyav", "torchcodec": "torchcodec"}


def _exhaust(batches: Any) -> None:
    for _ in batches:
        pass


def _webdataset(split: Split, batch: int, decoder: str, workers: int, size: int) -> torch.utils.data.DataLoader:
    """Build an equivalent DataLoader without distav: the same frames, random resized crops, flips, and the audio."""
    from webdataset.compat import WebDataset

    # With one shard, workers cannot split by shard, so each takes every n-th sample.
    shards = [str(path) for path in split.shards]
    dataset = WebDataset(shards, shardshuffle=False, nodesplitter=None, workersplitter=None)
    dataset: Any = dataset.compose(_every_nth)
    dataset = dataset.map(_Decode(decoder, split.sample_rate_hz, size)).batched(batch, partial=True)
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)


def _every_nth(samples: Iterator[dict]) -> Iterator[dict]:
    info = torch.utils.data.get_worker_info()
    step, first = (info.num_workers, info.id) if info else (1, 0)
    for index, sample in enumerate(samples):
        if index % step == first:
            yield sample


class _Decode:
    """Decodes and augments one sample."""

    def __init__(self, decoder: str, sample_rate_hz: int, size: int):
        self.decoder, self.num_samples, self.size = decoder, round(AUDIO_S * sample_rate_hz), size

    def __call__(self, sample: dict) -> tuple[Tensor, Tensor]:
        import soundfile
        from torchvision.transforms import v2

        torch.set_num_threads(1)
        start = int(torch.randint(0, 16 - (FRAMES - 1) * STRIDE, ()))
        numbers = [start + STRIDE * index for index in range(FRAMES)]
        frames = (self._decode_pyav if self.decoder == "pyav" else self._decode_torchcodec)(
            next(sample[key] for key in VIDEO_EXTENSIONS.values() if key in sample), numbers
        )
        augment = v2.Compose(
            [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)]
        )
        audio, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        return augment(frames), torch.from_numpy(audio[: self.num_samples])

    @staticmethod
    def _decode_pyav(video: bytes, numbers: list[int]) -> Tensor:
        import av

        frames = []
        with av.open(io.BytesIO(video), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if number >= numbers[-1]:
                    break
        return torch.stack(frames).permute(0, 3, 1, 2)

    @staticmethod
    def _decode_torchcodec(video: bytes, numbers: list[int]) -> Tensor:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

        return VideoDecoder(video, num_ffmpeg_threads=1).get_frames_at(numbers).data
