"""What the networks compute on a GPU equals what they compute on the CPU, in the memory and without the waits meant."""

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
from distav.models.visual_encoders import VisualTower
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
    "one place": ((128, 512, 1, 1), torch.contiguous_format),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parameters", BOTH)
@pytest.mark.parametrize("dtype", BOTH)
def test_the_fused_normalization_follows_the_plain_one(dtype: torch.dtype, parameters: torch.dtype, shape: str):
    size, layout = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(size, generator=generator) * 3 + 10).to(dtype)
    grad = torch.randn(size, generator=generator).to(dtype)
    weight, bias = torch.randn(2, size[1], generator=generator).to(parameters)
    oracle = normalized(_GlobalNormalize, x.float(), weight.float(), bias.float(), grad.float())
    x = x.cuda().contiguous(memory_format=layout)
    # The gradient comes in the other layout, as it may after a mean or a sum.
    fused = normalized(_FusedGlobalNormalize, x, weight.cuda(), bias.cuda(), grad.cuda())
    assert fused[0].is_contiguous(memory_format=layout) and fused[3].is_contiguous(memory_format=layout)
    kinds = (dtype, torch.float32, torch.float32, dtype, parameters, parameters)
    for ours, theirs, kind in zip(fused, oracle, kinds, strict=True):
        assert ours.dtype == kind
        places = 1e-2 if kind == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=places, atol=places * float(theirs.abs().mean()))


@pytest.mark.parametrize("dtype", BOTH)
def test_running_statistics_and_evaluation_are_the_same_on_both(dtype: torch.dtype):
    x = (torch.randn(8, 16, 2, 6, 6) * 3 + 10).to(dtype)
    here = GlobalBatchNorm(16)
    there = copy.deepcopy(here).cuda().to(dtype)
    for _ in range(3):
        here(x.float())
        there(x.cuda())
    assert there.running_mean.dtype == there.running_var.dtype == torch.float32
    places = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(there.running_mean.cpu(), here.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.running_var.cpu(), here.running_var, rtol=1e-4, atol=1e-5)
    ours, theirs = copy.deepcopy(there).eval()(x.cuda()), copy.deepcopy(here).eval()(x.float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.cpu().float(), theirs, rtol=places, atol=places)
    before = there.running_mean.clone(), there.running_var.clone()
    x[0, 3] = torch.nan
    there(x.cuda())
    for old, new in zip(before, (there.running_mean, there.running_var), strict=True):
        assert torch.isfinite(new).all() and old[3] == new[3]


def test_normalization_in_training_keeps_the_input_and_the_output_alone():
    layer = GlobalBatchNorm(64).cuda().to(torch.bfloat16)
    x = torch.randn(8, 64, 8, 56, 56, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last_3d
    )
    grad, x = torch.randn_like(x), x.requires_grad_()
    size, before = x.numel() * x.element_size(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer(x).backward(grad)
    assert torch.cuda.max_memory_allocated() - before < 2.1 * size  # the output, then the input's gradient


def test_frames_are_normalized_alike():
    tower = VisualTower(VisualConfig("small_conv"), DataConfig(), False)
    frames = torch.randint(0, 256, (4, 3, 20, 24, 3), dtype=torch.uint8)
    for dtype in BOTH:
        ours, theirs = tower._normalize(frames.cuda(), dtype), tower._normalize(frames, dtype)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def trained(name: str, device: str, dtype: torch.dtype, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    data = DataConfig(num_frames=4, frame_size=64)
    tower = VisualTower(VisualConfig(name), data, recompute).to(device, dtype)
    frames = torch.randint(0, 256, (8, 4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = torch.randn(8, tower.feature_dim, generator=torch.Generator().manual_seed(1))
    features = tower(frames.to(device))
    (features.float() * wanted.to(device)).sum().backward()
    gradient = torch.cat([each.grad.flatten().float().cpu() for each in tower.parameters() if each.grad is not None])
    statistics = torch.cat([each.flatten().float().cpu() for each in tower.buffers()] or [torch.zeros(1)])
    return features.detach().float().cpu(), gradient, statistics


def alike(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=-1).min()) if other.any() else 1.0


@pytest.mark.parametrize("name", ["r2plus1d_18", "vit_tiny"])
def test_a_tower_learns_the_same_on_both(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = trained(name, "cpu", torch.float32, False)
    for recompute in (False, True):
        for ours, theirs in zip(trained(name, "cuda", torch.float32, recompute), expected, strict=True):
            assert alike(ours, theirs) > 0.999
    # Of a new R(2+1)D the gradient is another in bfloat16, on the CPU too (cosine 0.5); of the features it is not.
    features, _, statistics = trained(name, "cuda", torch.bfloat16, True)
    assert alike(features, expected[0]) > 0.98 and alike(statistics, expected[2]) > 0.999


def waits(file: Path, *overrides: str) -> list[str]:
    """Train a contrastive phase on the GPU; returns where its third and fourth step wait for it in the main thread.

    Of the autograd engine's own thread the place told is that of the call of `backward`.
    """
    from distav.config import loading
    from distav.distributed.process_group import process_group
    from distav.training.phases.contrastive import run_contrastive
    from distav.training.run import open_run

    settings = loading.load(file, overrides)
    with process_group("gpu", 120, 4) as world, open_run(settings, world) as run, warnings.catch_warnings():
        found: list[str] = []

        def note(message: object, category: object, filename: str, lineno: int, *more: object) -> None:
            here = threading.current_thread() is threading.main_thread()  # The loader's thread may wait.
            if here and run.progress.step in (2, 3) and "synchroniz" in str(message):
                found.append(f"{filename}:{lineno}")

        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        run_contrastive(run, "last", settings.phases["last"])  # type: ignore[arg-type]
        torch.cuda.set_sync_debug_mode("default")
    return found


DEEPSPEED_WAITS = 16
"""Waits of DeepSpeed's own in two steps at stage 1: `has_overflow` reads one flag, and `is_invalid_grad_norm` is asked
of the norm once and again for each of the four groups of parameters before they are clipped."""


def test_a_step_waits_for_the_gpu_in_deepspeeds_overflow_check_alone(tmp_path: Path):
    pytest.importorskip("deepspeed")
    make_shards("synthetic", tmp_path / "set", "--train-clips=96", "--test-clips=24", "--codec=h264",
                "--short-side=160")  # fmt: skip
    phase = "phases:\n  last: {kind: contrastive, epochs: 2, pair_weighting_start: 0, within_modal_weight: 1.0}\n"
    file = tiny_config(tmp_path, TINY[: TINY.index("phases:")] + phase)
    given = [f"data.root={tmp_path / 'set'}", f"run.root={tmp_path}", "run.device=gpu", "run.log_every=1000",
             "run.checkpoint_every=1000", "monitor.media_every=1000", "deepspeed.zero_stage=1"]  # fmt: skip
    script = f"import json; from {__name__} import waits; from pathlib import Path; "
    script += f"print('waits', json.dumps(waits(Path({str(file)!r}), *{given!r})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("waits ")).split(" ", 1)[1])
    others = [each for each in found if "/deepspeed/" not in each]
    assert not others and len(found) <= DEEPSPEED_WAITS, sorted(set(found))
