"""A complete training step, compared with a plain PyTorch loop with the same towers and losses."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distav.config import loading
from distav.config.phases import ContrastivePhase
from distav.config.schema import Config
from distav.data.pipeline.loader import Batch
from distav.distributed.process_group import process_group
from distav.memory.bank import Bank
from distav.models.av_model import AVModel, parameter_groups
from distav.training.lr_schedule import lr_factor
from distav.training.phases.contrastive import contrastive_losses
from distav.training.run import Run
from distav.training.run_setup import open_run
from tools.bench.loader import make_clips
from tools.bench.timing import Results, Setting

STEPS = 5


@dataclass(frozen=True)
class Towers:
    """Towers of one size.

    Attributes:
        config: file in configs/ whose contrastive phase is measured.
        batch: default number of clips per step, for a GPU with 80 GB.
        overrides: settings that override those of the file.
    """

    config: str
    batch: int
    overrides: tuple[str, ...] = ()

    def settings(self, *overrides: str) -> Config:
        """Return the settings with the contrastive phase alone."""
        settings = loading.load(Path(__file__).parents[2] / "configs" / self.config, [*self.overrides, *overrides])
        phases = settings.phases.items()
        settings.phases = {name: phase for name, phase in phases if isinstance(phase, ContrastivePhase)}
        return settings


TOWERS = {
    "small": Towers("quickstart.yaml", 64, ("model.visual.width=24", "model.audio.width=24", "data.num_frames=4",
                                            "data.frame_size=64")),
    "vit-l": Towers("quickstart.yaml", 32, ("model.visual.name=vit_large", "model.audio.name=vit_large",
                                            "data.num_frames=8", "data.frame_size=224")),
    "r2plus1d_18": Towers("multinode.yaml", 128),
}  # fmt: skip


class BareEngine:
    """A model and its optimizer in plain PyTorch, with the interface of a run's engine."""

    def __init__(self, settings: Config, build: Callable[[], nn.Module], device: torch.device):
        torch.manual_seed(settings.run.seed)
        self.model = build().to(device)
        optim = settings.optim
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2)
        )
        self.grad_clip = optim.grad_clip
        self.half = device.type == "cuda"

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Run the model on a batch."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.half):
            outputs = self.model(**batch.media, seeds=batch.seeds)
        return {name: value.float() for name, value in outputs.items()}

    def update(self, loss: Tensor) -> None:
        """Compute gradients, clip them and update the parameters."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()


def run(setting: Setting, towers: str, batch: int | None, clips: int, overrides: Sequence[str] = ()) -> Results:
    """Measure a step of the contrastive phase on batches in memory.

    Args:
        setting: device, threads, rounds; a round has five steps.
        towers: size of the towers.
        batch: clips per step; None for the default of the size.
        clips: number of clips.
        overrides: settings that override those of the size, as `key=value`.
    """
    batch = batch or TOWERS[towers].batch
    arguments = {"towers": towers, "batch": batch, "threads": setting.threads, "device": setting.device.type}
    results = Results("step", arguments | ({"overrides": " ".join(overrides)} if overrides else {}))
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as name:
        directory = Path(name)
        make_clips(directory / "dataset", clips)
        settings = TOWERS[towers].settings(
            f"data.root={directory / 'dataset'}", f"run.root={directory}", "run.name=bench",
            f"optim.global_batch={batch}", f"run.threads_per_rank={setting.threads}",
            f"run.device={'gpu' if setting.device.type == 'cuda' else 'cpu'}", *overrides,
        )  # fmt: skip
        with process_group(settings.run.device.name, 600, setting.threads) as world, open_run(settings, world) as run:
            _measure(results, setting, run.config, run, world.device)
    return results


def _measure(results: Results, setting: Setting, settings: Config, run: Run, device: torch.device) -> None:
    phase: Any = next(iter(settings.phases.values()))
    sampler = run.sampler(0)
    loaded = [run.loader.load(sampler.batch(step), 0) for step in range(min(STEPS, sampler.steps_per_epoch))]
    batches = [loaded[step % len(loaded)] for step in range(STEPS)]
    num_classes, sample_rate_hz = len(run.data.shards.classes), run.data.train.sample_rate_hz
    # Counted apart from the step, since the counter does not support the fused attention over the memory bank.
    operations = count_operations(settings, sample_rate_hz, num_classes, batches[0])
    results.add_value("operations of a step, encoders and heads", operations / 1e9, "GFLOP")
    losses = contrastive_losses(run, phase)
    run.engine.train()

    def distav_steps() -> None:
        for index, batch in enumerate(batches):
            lr = settings.optim.lr * lr_factor(index / 100, 0.1, 0.0)
            run.engine.set_lr(lr, lr)
            run.engine.backward(losses(batch, 0.5)["loss"])
            run.engine.step()

    if device.type == "cuda":  # Before the second model is created.
        torch.cuda.reset_peak_memory_stats(device)
        distav_steps()
        results.add_value("peak memory of the GPU", torch.cuda.max_memory_allocated(device) / 2**30, "GiB")
    engine = BareEngine(settings, lambda: AVModel(settings.model, settings.data, sample_rate_hz, num_classes), device)
    bank = Bank(
        len(run.data.train),
        settings.model.embed_dim,
        settings.memory_bank.momentum,
        device,
        num_categories=num_classes,
        dtype=run.bank.dtype,
    )
    bare: Any = dataclasses.replace(run, engine=engine, bank=bank)  # type: ignore[arg-type]
    bare_losses = contrastive_losses(bare, phase)
    engine.model.train()

    def bare_steps() -> None:
        for batch in batches:
            engine.update(bare_losses(batch, 0.5)["loss"])

    seconds = setting.interleaved({"distav": distav_steps, "bare PyTorch loop": bare_steps})
    num_clips = len(batches) * settings.optim.global_batch
    results.add_times(seconds, {name: (num_clips, "clips/s") for name in seconds})
    results.add_ratio("distav / bare PyTorch loop", (seconds["distav"], seconds["bare PyTorch loop"]), "<= 1.05")
    matmul = matmul_rate(setting, device)
    results.add_value("rate of a square matrix product", matmul / 1e9, "GFLOP/s")
    relative = operations * len(batches) / results.figures["distav"]["median_s"] / matmul
    results.add_ratio("rate of a step / rate of a matrix product", relative, ">= 0.4" if device.type == "cuda" else "")


def count_operations(settings: Config, sample_rate_hz: int, num_classes: int, batch: Batch) -> int:
    """Return the floating-point operations of encoders and heads in a step, forward and backward.

    Recomputation by activation checkpointing and the loss over the memory bank are not counted. The model is built on
    the meta device, so nothing is computed.
    """
    model_settings = copy.deepcopy(settings.model)
    model_settings.activation_checkpointing = False
    with torch.device("meta"):
        model = AVModel(model_settings, settings.data, sample_rate_hz, num_classes)
    media = {name: tensor.to("meta") for name, tensor in batch.media.items()}
    with FlopCounterMode(display=False) as counter:
        outputs = model(**media, seeds=batch.seeds.to("meta"))
        torch.stack([output.float().sum() for output in outputs.values()]).sum().backward()
    return counter.get_total_flops()


def matmul_rate(setting: Setting, device: torch.device) -> float:
    """Return the operations per second of a square matrix product, in bfloat16 on a GPU and float32 on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = setting.interleaved({"product": lambda: matrix @ matrix})["product"]
    return 2 * size**3 / min(seconds)
