"""Batches from end to end, beside their slowest stage alone and beside webdataset with PyAV in a DataLoader."""

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
from distav.data.dataset import VIDEO_EXTENSIONS, ShardedDataset, Split
from distav.data.pipeline.augmentation import ClipTransformSampler
from distav.data.pipeline.dali import ClipPipeline
from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.reader import ShardReader
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.synthetic import SyntheticSource
from tools.bench.timing import Results, Setting

FRAMES, STRIDE, AUDIO_S = 8, 2, 1.0
SIDES = {"cpu": (128, 112), "cuda": (256, 224)}
"""Pixels of the short side of stored frames, and of the frames that are fed; NVDEC takes no smaller ones than 144."""
STEP_OVER_LOADER = 1.25


def make_clips(folder: Path, clips: int, codec: str = "mjpeg", short_side: int = 128) -> Split:
    """Render a dataset of two-second clips of 16 frames."""
    build_dataset(
        SyntheticSource(train_clips=clips, test_clips=1),
        folder,
        BuildConfig(Encoding(codec, fps=8, short_side=short_side, clip_s=2.0)),
        workers=torch.get_num_threads(),
    )
    return ShardedDataset.open(folder).split("train")


def run(setting: Setting, clips: int, batch: int, codec: str = "mjpeg") -> Results:
    """Measure the loader by the wall clock.

    Args:
        setting: device, threads, rounds.
        clips: clips of the set.
        batch: clips of a batch.
        codec: codec of the clips.
    """
    arguments = {"clips": clips, "batch": batch, "threads": setting.threads, "device": setting.device.type}
    stored, size = SIDES[setting.device.type]
    results = Results("loader", arguments | {"frames": f"{FRAMES} of 16, {stored} px {codec} -> {size} px"})
    setting = Setting(setting.device, max(2, setting.threads), setting.rounds)  # by the wall clock in any case
    data = DataConfig(num_frames=FRAMES, frame_stride=STRIDE, frame_size=size, audio_s=AUDIO_S)
    data.decode_threads = setting.threads
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as name:
        split = make_clips(Path(name) / "set", clips, codec, stored)
        number = len(split) // batch
        plan = [(ids, 0) for ids in np.arange(number * batch).reshape(number, batch)]
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
        results.add_times(seconds, {each: (number * batch, "clips/s") for each in seconds})
        read, decode, whole = (seconds[each] for each in list(seconds)[:3])
        slowest = [max(pair) for pair in zip(read, decode, strict=True)]
        results.add_ratio("clips/s of the loader / its slowest stage", (slowest, whole), ">= 0.9")
        for name in peers:
            peer = seconds[f"webdataset + {name} in a DataLoader"]
            bar = {"PyAV": ">= 1.3", "torchcodec": ">= 1"}[name] if codec == "mjpeg" else ""
            results.add_ratio(f"clips/s of the loader / webdataset + {name}", (peer, whole), bar)
        wait = _data_wait(loader, plan * 2, _step(setting.device, STEP_OVER_LOADER * float(np.median(whole)) / number))
        results.add_ratio("data wait, share of a step of 1.25 batches' time", wait, "<= 0.02")
        loader.close()
    return results


class _Stages:
    """The two stages of the loader, each with the input of the other at hand."""

    def __init__(self, split: Split, data: DataConfig, plan: list, device: torch.device):
        self.plan = plan
        self.reader = ShardReader(split)
        self.graph = ClipPipeline(data, split, len(plan[0][0]), device)
        viewer = ClipTransformSampler(split, data, AugmentConfig(), 0)
        self.views = [[viewer.sample(int(sample), epoch) for sample in ids] for ids, epoch in plan]
        self.members = [[self.reader.read(int(sample)) for sample in ids] for ids, _ in plan]

    def read(self) -> None:
        for ids, _ in self.plan:
            for sample in ids:
                self.reader.read(int(sample))

    def decode(self) -> None:
        for members, views in zip(self.members, self.views, strict=True):
            self.graph.run(members, views)


def _step(device: torch.device, seconds: float) -> Callable[[], None]:
    """Return a stand-in for a training step of that length, which leaves the processor to the loader.

    On a GPU it queues matrix products, so that a loader which waits for queued work is found out.
    """
    if device.type == "cpu":
        return lambda: time.sleep(seconds)
    factor = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(factor)

    def products(number: int) -> None:
        for _ in range(number):
            torch.mm(factor, factor, out=product)

    products(20)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    products(200)
    torch.cuda.synchronize(device)
    number = max(1, round(200 * seconds / (time.perf_counter() - began)))
    return lambda: products(number)


def _data_wait(loader: Loader, plan: list, step: Callable[[], None]) -> float:
    """Return the fraction of a step that is spent waiting for data, by comparison with a batch kept in memory."""

    def steps(batches: Iterator[Batch]) -> float:
        next(batches)
        began = time.perf_counter()
        for _ in range(len(plan) - 1):
            step()
            next(batches)
        if loader.device.type == "cuda":
            torch.cuda.synchronize(loader.device)
        return time.perf_counter() - began

    cached = next(iter(loader.batches(plan[:1])))
    real, ideal = steps(loader.batches(plan)), steps(iter([cached] * len(plan)))
    return max(0.0, (real - ideal) / real)


def _decoders() -> dict[str, str]:
    """Return the decoders to compare with; torchcodec needs FFmpeg's libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        print(f"torchcodec is left out: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return {"PyAV": "pyav"}
    return {"PyAV": "pyav", "torchcodec": "torchcodec"}


def _exhaust(batches: Any) -> None:
    for _ in batches:
        pass


def _webdataset(split: Split, batch: int, decoder: str, workers: int, size: int) -> torch.utils.data.DataLoader:
    """Build what one would write without distav: the same frames, crops of random size, a flip, and the sound."""
    from webdataset.compat import WebDataset

    # One shard cannot be shared among workers, so each takes every n-th sample.
    shards = [str(path) for path in split.shards]
    dataset = WebDataset(shards, shardshuffle=False, nodesplitter=None, workersplitter=None)
    dataset: Any = dataset.compose(_every_nth)
    dataset = dataset.map(_Decoded(decoder, split.sample_rate_hz, size)).batched(batch, partial=True)
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)


def _every_nth(samples: Iterator[dict]) -> Iterator[dict]:
    info = torch.utils.data.get_worker_info()
    step, first = (info.num_workers, info.id) if info else (1, 0)
    for number, sample in enumerate(samples):
        if number % step == first:
            yield sample


class _Decoded:
    """Decodes and augments one sample."""

    def __init__(self, decoder: str, sample_rate_hz: int, size: int):
        self.decoder, self.num_samples, self.size = decoder, round(AUDIO_S * sample_rate_hz), size

    def __call__(self, sample: dict) -> tuple[Tensor, Tensor]:
        import soundfile
        from torchvision.transforms import v2

        torch.set_num_threads(1)
        start = int(torch.randint(0, 16 - (FRAMES - 1) * STRIDE, ()))
        wanted = [start + STRIDE * number for number in range(FRAMES)]
        frames = (self._by_pyav if self.decoder == "pyav" else self._by_torchcodec)(
            next(sample[key] for key in VIDEO_EXTENSIONS.values() if key in sample), wanted
        )
        change = v2.Compose(
            [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)]
        )
        sound, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        return change(frames), torch.from_numpy(sound[: self.num_samples])

    @staticmethod
    def _by_pyav(video: bytes, wanted: list[int]) -> Tensor:
        import av

        frames = []
        with av.open(io.BytesIO(video), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if number >= wanted[-1]:
                    break
        return torch.stack(frames).permute(0, 3, 1, 2)

    @staticmethod
    def _by_torchcodec(video: bytes, wanted: list[int]) -> Tensor:
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(video, num_ffmpeg_threads=1).get_frames_at(wanted).data
