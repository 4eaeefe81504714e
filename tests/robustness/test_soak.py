"""Memory and open files do not grow over thousands of batches; checking members takes little time."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import crc32
from distav.data.pipeline.sampler import GlobalBatchSampler
from tests.conftest import make_shards
from tests.helpers.spawn import on_ranks

DATA = DataConfig(num_frames=2, frame_stride=2, frame_size=16, audio_s=0.5)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _read_many(shards: str, batches: int) -> tuple[list[float], list[int]]:
    """Return the resident memory in MiB and the number of open files over the batches."""
    split = ShardedDataset.open(shards).split("train")
    loader = Loader(split, DATA, AugmentConfig(), 0, 24, torch.device("cpu"))
    order = GlobalBatchSampler(split.shard_sizes, 0, 64, 24, 1)
    plan = ((order.batch(step), step // order.steps_per_epoch) for step in range(batches))
    memory, files = [], []
    for number, _ in enumerate(loader.batches(plan)):
        if number % (batches // 100) == 0:
            memory.append(resident_mib())
            files.append(len(os.listdir("/proc/self/fd")))
    loader.close()
    return memory, files


@pytest.mark.parametrize("batches", [400, pytest.param(5000, marks=pytest.mark.long)])
def test_memory_and_open_files_do_not_grow(tiny_shards: Path, batches: int):
    # In a separate process, which earlier tests do not affect.
    memory, files = on_ranks(1, _read_many, str(tiny_shards), batches, timeout_s=600)[0]
    late = memory[len(memory) // 2 :]
    slope = np.polyfit(np.arange(len(late)), late, 1)[0] * 100  # MiB over as many batches as the test has
    print(f"{batches} batches: {memory[0]:.0f} to {memory[-1]:.0f} MiB, slope {slope:.2f} MiB, files {set(files)}")
    assert slope < 8 and max(files) - min(files) <= 1


@pytest.mark.long
def test_checking_members_takes_at_most_two_percent_of_the_loader(tmp_path: Path):
    make_shards("synthetic", tmp_path / "shards", "--train-clips=64", "--test-clips=0", "--short-side=128")
    split = ShardedDataset.open(tmp_path / "shards").split("train")
    data = DataConfig(num_frames=4, frame_stride=2, frame_size=112, audio_s=1.0)
    loader = Loader(split, data, None, 0, 32, torch.device("cpu"))
    ids = np.arange(32)
    loader.load(ids, 0)
    members = [loader.reader.read(int(sample)) for sample in ids]
    loading_s, checking_s = [], []
    for _ in range(7):
        began = time.process_time()
        loader.load(ids, 0)
        middle = time.process_time()
        for sample in members:
            crc32(sample["video"]), crc32(sample["audio"])
        loading_s.append(middle - began), checking_s.append(time.process_time() - middle)
    loader.close()
    fraction = float(np.median(checking_s) / np.median(loading_s))
    print(f"CRC-32 takes {100 * fraction:.2f} % of the loader's CPU time")
    assert fraction <= 0.02
