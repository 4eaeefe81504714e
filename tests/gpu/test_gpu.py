"""What runs on a GPU equals what runs on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distav.data.format import ShardSet
from distav.data.loader import Loader
from distav.memory.bank import Bank
from distav.memory.neighbors import nearest_neighbors
from distav.memory.softmax import attend
from distav.seeding import sample_seeds, uniform
from distav.settings import AugmentSettings, DataSettings
from tests.conftest import make_shards
from tests.helpers.launch import losses, tiny_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = DataSettings(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_the_graph_decodes_alike_on_gpu_and_cpu(codec: str, tmp_path: Path):
    # NVDEC takes no frames as small as the other tests use.
    make_shards("synthetic", tmp_path, "--train-clips=8", "--test-clips=1", f"--codec={codec}", "--short-side=160")
    split = ShardSet.open(tmp_path).split("train")
    ids = np.arange(8)
    batches = [
        Loader(split, DATA, AugmentSettings(), 0, 8, device).load(ids, 0)
        for device in (torch.device("cpu"), torch.device("cuda", 0))
    ]
    assert batches[1].frames.is_cuda and batches[1].valid.all()
    difference = (batches[0].frames.int() - batches[1].frames.cpu().int()).abs().float()
    assert difference.mean() < 4
    torch.testing.assert_close(batches[0].sound, batches[1].sound.cpu(), atol=1e-4, rtol=1e-3)


def test_random_numbers_are_the_same_on_both():
    seeds = sample_seeds(1, 2, torch.arange(50))
    assert torch.equal(uniform(seeds, 3, 9), uniform(seeds.cuda(), 3, 9).cpu())
    rows = [Bank(20, 8, 0.5, torch.device(kind)).columns["visual"].cpu() for kind in ("cpu", "cuda")]
    torch.testing.assert_close(rows[0], rows[1])


def test_attention_and_neighbors_are_the_same_on_both():
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(3000, 32, generator=generator), dim=1)
    for ours, theirs in zip(
        attend(keys[:9], keys, keys, 0.07), attend(keys[:9].cuda(), keys.cuda(), keys.cuda(), 0.07), strict=True
    ):
        torch.testing.assert_close(ours, theirs.cpu(), atol=1e-4, rtol=1e-4)
    groups, valid = torch.arange(3000), torch.ones(3000, dtype=torch.bool)
    ids = [nearest_neighbors(keys.to(kind), 10, groups.to(kind), valid.to(kind))[0].cpu() for kind in ("cpu", "cuda")]
    assert (ids[0] == ids[1]).float().mean() > 0.999


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_in_bf16_follows_the_cpu_in_fp32(stage: int, tmp_path: Path):
    make_shards("synthetic", tmp_path / "set", "--train-clips=96", "--test-clips=24", "--short-side=160")
    for device in ("gpu", "cpu"):
        train(
            tiny_config(tmp_path),
            f"data.root={tmp_path / 'set'}",
            f"run.root={tmp_path / device}",
            f"run.device={device}",
            f"deepspeed.zero_stage={stage if device == 'gpu' else 0}",
        )
    np.testing.assert_allclose(losses(tmp_path / "gpu" / "tiny"), losses(tmp_path / "cpu" / "tiny"), rtol=0.1)
