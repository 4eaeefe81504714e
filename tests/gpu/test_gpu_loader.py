"""The loader on a GPU."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from tests.conftest import make_shards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=112, audio_s=0.5)


H264 = pytest.param("h264", marks=pytest.mark.xfail(reason="DALI's video decoder waits for queued work", strict=True))


@pytest.mark.parametrize("codec", ["mjpeg", H264])
def test_loading_does_not_wait_for_queued_training_steps(codec: str, tmp_path: Path):
    make_shards("synthetic", tmp_path, "--train-clips=16", "--test-clips=1", f"--codec={codec}", "--short-side=160")
    device = torch.device("cuda", 0)
    loader = Loader(ShardedDataset.open(tmp_path).split("train"), DATA, AugmentConfig(), 0, 16, device)
    expected = loader.load(np.arange(16), 0)
    started = time.perf_counter()
    list(loader.batches([(np.arange(16), 0)]))
    torch.cuda.synchronize()
    cycles_per_s = 2e9
    torch.cuda._sleep(int(cycles_per_s * (2 + 5 * (time.perf_counter() - started))))  # Occupies one multiprocessor.
    end = torch.cuda.Event()
    end.record()
    (batch,) = loader.batches([(np.arange(16), 0)])
    assert not end.query()
    torch.cuda.synchronize()
    for name, values in batch.media.items():
        assert torch.equal(values, expected.media[name])


def test_undecodable_clip_is_masked(tmp_path: Path):
    make_shards("synthetic", tmp_path, "--train-clips=8", "--test-clips=1", "--codec=mjpeg", "--short-side=160")
    loader = Loader(ShardedDataset.open(tmp_path).split("train"), DATA, None, 0, 8, torch.device("cuda", 0))
    read = loader._read
    loader._read = lambda sample: read(sample) | {"video": b"none" * 99} if sample == 5 else read(sample)  # type: ignore
    batch = loader.load(np.arange(8), 0)
    assert batch.valid.tolist() == [row != 5 for row in range(8)]
    assert list(loader.quarantine.reasons) == [5]
