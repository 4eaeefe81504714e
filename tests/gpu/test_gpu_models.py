"""Networks on a GPU: equal to the CPU, within the expected memory, without unexpected synchronizations."""

import copy
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distav.config.model import VisualConfig
from distav.config.schema import DataConfig
from distav.models.layers import GlobalBatchNorm, _FusedGlobalNormalize, _GlobalNormalize
from distav.models.towers import VisualTower
from tests.conftest import make_shards
from tests.helpers.launch import ROOT, TINY, tiny_config
from tests.helpers.normalization import normalized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BOTH = [torch.float32, torch.bfloat16]
SHAPES = {
    "clips": ((6, 45, 4, 14, 14), torch.contiguous_format),
    "clips, channels last": ((6, 45, 4, 14, 14), torch.channels_last_3d),
    "spectrograms": ((6, 64, 17, 19), torch.contiguous_format),
    "spectrograms, channels last": ((6, 64, 17, 19), torch.channels_last),
    "features": ((128, 512), torch.contiguous_format),
    "one position": ((128, 512, 1, 1), torch.contiguous_format),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parameters", BOTH)
@pytest.mark.parametrize("dtype", BOTH)
def test_the_fused_normalization_equals_the_plain_one(dtype: torch.dtype, parameters: torch.dtype, shape: str):
    size, layout = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(size, generator=generator) * 3 + 10).to(dtype)
    grad = torch.randn(size, generator=generator).to(dtype)
    weight, bias = torch.randn(2, size[1], generator=generator).to(parameters)
    expected = normalized(_GlobalNormalize, x.float(), weight.float(), bias.float(), grad.float())
    x = x.cuda().contiguous(memory_format=layout)
    # The gradient is contiguous, as it may be after a mean or a sum.
    fused = normalized(_FusedGlobalNormalize, x, weight.cuda(), bias.cuda(), grad.cuda())
    assert fused[0].shape == fused[3].shape == size
    if len(size) > 3:
        last = torch.channels_last if len(size) == 4 else torch.channels_last_3d
        assert fused[0].is_contiguous(memory_format=last)
    dtypes = (dtype, torch.float32, torch.float32, dtype, parameters, parameters)
    for ours, theirs, result_dtype in zip(fused, expected, dtypes, strict=True):
        assert ours.dtype == result_dtype
        tolerance = 1e-2 if result_dtype == torch.bfloat16 else 1e-4
        atol = tolerance * float(theirs.abs().mean())
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("dtype", BOTH)
def test_running_statistics_and_evaluation_equal_those_of_the_cpu(dtype: torch.dtype):
    x = (torch.randn(8, 16, 2, 6, 6) * 3 + 10).to(dtype)
    on_cpu = GlobalBatchNorm(16)
    on_gpu = copy.deepcopy(on_cpu).cuda().to(dtype)
    for _ in range(3):
        on_cpu(x.float())
        on_gpu(x.cuda())
    assert on_gpu.running_mean.dtype == on_gpu.running_var.dtype == torch.float32
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(on_gpu.running_mean.cpu(), on_cpu.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_gpu.running_var.cpu(), on_cpu.running_var, rtol=1e-4, atol=1e-5)
    ours, theirs = copy.deepcopy(on_gpu).eval()(x.cuda()), copy.deepcopy(on_cpu).eval()(x.float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.cpu().float(), theirs, rtol=tolerance, atol=tolerance)
    before = on_gpu.running_mean.clone(), on_gpu.running_var.clone()
    x[0, 3] = torch.nan
    on_gpu(x.cuda())
    for old, new in zip(before, (on_gpu.running_mean, on_gpu.running_var), strict=True):
        assert torch.isfinite(new).all() and old[3] == new[3]


def test_normalization_in_training_stores_only_the_input_and_the_output():
    layer = GlobalBatchNorm(64).cuda().to(torch.bfloat16)
    x = torch.randn(8, 64, 8, 56, 56, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last_3d
    )
    grad, x = torch.randn_like(x), x.requires_grad_()
    size, before = x.numel() * x.element_size(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer(x).backward(grad)
    assert torch.cuda.max_memory_allocated() - before < 2.1 * size  # the output, then the input's gradient


def test_frames_are_normalized_as_on_the_cpu():
    tower = VisualTower(VisualConfig("small_conv"), DataConfig(), False)
    frames = torch.randint(0, 256, (4, 3, 20, 24, 3), dtype=torch.uint8)
    for dtype in BOTH:
        ours, theirs = tower._normalize(frames.cuda(), dtype), tower._normalize(frames, dtype)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def train_step(
    name: str, device: str, dtype: torch.dtype, activation_checkpointing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    data = DataConfig(num_frames=4, frame_size=64)
    tower = VisualTower(VisualConfig(name), data, activation_checkpointing).to(device, dtype)
    frames = torch.randint(0, 256, (8, 4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(8, tower.feature_dim, generator=torch.Generator().manual_seed(1))
    features = tower(frames.to(device))
    (features.float() * weights.to(device)).sum().backward()
    gradient = torch.cat(
        [weight.grad.flatten().float().cpu() for weight in tower.parameters() if weight.grad is not None]
    )
    statistics = torch.cat([buffer.flatten().float().cpu() for buffer in tower.buffers()] or [torch.zeros(1)])
    return features.detach().float().cpu(), gradient, statistics


def min_cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=-1).min()) if other.any() else 1.0


@pytest.mark.parametrize("name", ["r2plus1d_18", "vit_tiny"])
def test_a_tower_has_the_features_and_gradients_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = train_step(name, "cpu", torch.float32, False)
    for activation_checkpointing in (False, True):
        for ours, theirs in zip(
            train_step(name, "cuda", torch.float32, activation_checkpointing), expected, strict=True
        ):
            assert min_cosine(ours, theirs) > 0.999
    # In bfloat16 the gradient of a newly initialized R(2+1)D differs, on the CPU too (cosine 0.5); its features do not.
    features, _, statistics = train_step(name, "cuda", torch.bfloat16, True)
    assert min_cosine(features, expected[0]) > 0.98 and min_cosine(statistics, expected[2]) > 0.999


def synchronizations(file: Path, *overrides: str) -> list[str]:
    """Train a contrastive phase on the GPU; return where the main thread waits for it in the third and fourth step.

    For the thread of the autograd engine, the location is the call of `backward`.
    """
    from distav.config import loading
    from distav.distributed.process_group import process_group
    from distav.training.phases.contrastive import run_contrastive
    from distav.training.run_setup import open_run

    config = loading.load(file, overrides)
    with process_group("gpu", 120, 4) as world, open_run(config, world) as run, warnings.catch_warnings():
        locations: list[str] = []

        def record(message: object, category: object, filename: str, lineno: int, *rest: object) -> None:
            on_main_thread = threading.current_thread() is threading.main_thread()  # The loader's thread may wait.
            if on_main_thread and run.progress.step in (2, 3) and "synchroniz" in str(message):
                locations.append(f"{filename}:{lineno}")

        warnings.simplefilter("always")
        warnings.showwarning = record  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        run_contrastive(run, "last", config.phases["last"])  # type: ignore[arg-type]
        torch.cuda.set_sync_debug_mode("default")
    return locations


DEEPSPEED_SYNCHRONIZATIONS = 16
"""Synchronizations inside DeepSpeed in two steps at stage 1: `has_overflow` reads one flag, and `is_invalid_grad_norm`
reads the norm once, and again for each of the four parameter groups before they are clipped."""


def test_a_step_synchronizes_with_the_gpu_in_the_overflow_check_of_deepspeed_alone(tmp_path: Path):
    pytest.importorskip("deepspeed")
    make_shards("synthetic", tmp_path / "dataset", "--train-clips=96", "--test-clips=24", "--codec=h264",
                "--short-side=160")  # fmt: skip
    phase = "phases:\n  last: {kind: contrastive, epochs: 2, pair_weighting_start: 0, within_modal_weight: 1.0}\n"
    file = tiny_config(tmp_path, TINY[: TINY.index("phases:")] + phase)
    overrides = [f"data.root={tmp_path / 'dataset'}", f"run.root={tmp_path}", "run.device=gpu", "run.log_every=1000",
                 "run.checkpoint_every=1000", "monitor.media_every=1000", "deepspeed.zero_stage=1"]  # fmt: skip
    script = f"import json; from {__name__} import synchronizations; from pathlib import Path; "
    script += f"print('locations', json.dumps(synchronizations(Path({str(file)!r}), *{overrides!r})))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("locations "))
    locations = json.loads(line.split(" ", 1)[1])
    outside_deepspeed = [location for location in locations if "/deepspeed/" not in location]
    assert not outside_deepspeed and len(locations) <= DEEPSPEED_SYNCHRONIZATIONS, sorted(set(locations))
