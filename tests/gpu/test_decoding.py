"""DALI decodes the same frames and audio as PyAV and libsndfile, on the CPU and on a GPU."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from distav.config.schema import DataConfig
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import ShardReader
from tests.conftest import make_shards

SIDE = 160
"""Side of the frames: large enough for NVDEC, and not resized."""
DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=SIDE, audio_s=0.5)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=ON_GPU)])
@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_pipeline_equals_pyav_and_soundfile(codec: str, device: str, tmp_path: Path):
    make_shards("synthetic", tmp_path, "--train-clips=4", "--test-clips=1", f"--codec={codec}", f"--short-side={SIDE}")
    split = ShardedDataset.open(tmp_path).split("train")
    loader, reader = Loader(split, DATA, None, 0, 4, torch.device(device)), ShardReader(split)
    batch = loader.load(np.arange(4), 0)
    assert batch.valid.all() and not loader.quarantine.reasons
    for sample in range(4):
        members, transform = reader.read(sample), loader.transform_sampler.sample(sample, 0)  # pyright: ignore[reportOptionalMemberAccess]
        with av.open(io.BytesIO(members["video"]), "r") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        expected = np.stack(frames[transform.start_frame :: DATA.frame_stride][: DATA.num_frames]).astype(int)
        difference = np.abs(batch.media["frames"][sample].cpu().numpy().astype(int) - expected)
        assert difference.mean() < 4  # Decoders upsample chroma differently.
        waveform, _ = soundfile.read(io.BytesIO(members["audio"]), dtype="float32")
        audio = batch.media["audio"][sample].cpu().numpy()
        np.testing.assert_allclose(audio, waveform[transform.audio_start :][: len(audio)], atol=1e-4)
    reader.close()
    loader.close()
