"""A whole training step, beside a bare PyTorch loop with the same towers and losses."""

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
from distav.training.run import Run, open_run
from tools.bench.loader import make_clips
from tools.bench.timing import Results, Setting

STEPS = 5


@dataclass(frozen=True)
class Towers:
    """Encoders of one size.

    Attributes:
        config: the file in configs/ whose contrastive phase is measured.
        batch: default number of clips of a step, chosen for a GPU of 80 GB.
        overrides: settings that replace the file's.
    """

    config: str
    batch: int
    overrides: tuple[str, ...] = ()

    def settings(self, *more: str) -> Config:
        """Return the settings, with the contrastive phase alone."""
        settings = loading.load(Path(__file__).parents[2] / "configs" / self.config, [*self.overrides, *more])
        phases = settings.phases.items()
        settings.phases = {name: each for name, each in phases if isinstance(each, ContrastivePhase)}
        return settings


TOWERS = {
    "small": Towers("quickstart.yaml", 64, ("model.visual.width=24", "model.audio.width=24", "data.num_frames=4",
                                            "data.frame_size=64")),
    "vit-l": Towers("quickstart.yaml", 32, ("model.visual.name=vit_large", "model.audio.name=vit_large",
                                            "data.num_frames=8", "data.frame_size=224")),
    "r2plus1d_18": Towers("multinode.yaml", 128),
}  # fmt: skip


class BareEngine:
    """A model and its optimiser as one writes them by hand; called like the engine of a run."""

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
        """Backward, clip, step."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()


def run(setting: Setting, towers: str, batch: int | None, clips: int, overrides: Sequence[str] = ()) -> Results:
    """Measure the contrastive phase's step on batches kept in memory.

    Args:
        setting: device, threads, rounds; a round is five steps.
        towers: name of a size.
        batch: clips of a step; None for what goes with the size.
        clips: clips of the set.
        overrides: settings that replace those of the size, as `key=value`.
    """
    batch = batch or TOWERS[towers].batch
    arguments = {"towers": towers, "batch": batch, "threads": setting.threads, "device": setting.device.type}
    results = Results("step", arguments | ({"overrides": " ".join(overrides)} if overrides else {}))
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as name:
        folder = Path(name)
        split = make_clips(folder / "set", clips)
        del split
        settings = TOWERS[towers].settings(
            f"data.root={folder / 'set'}", f"run.root={folder}", "run.name=bench", f"optim.global_batch={batch}",
            f"run.threads_per_rank={setting.threads}", "data.synthetic.enabled=false",
            f"run.device={'gpu' if setting.device.type == 'cuda' else 'cpu'}", *overrides,
        )  # fmt: skip
        with process_group(settings.run.device.name, 600, setting.threads) as world, open_run(settings, world) as whole:
            _measure(results, setting, settings, whole, world.device)
    return results


def _measure(results: Results, setting: Setting, settings: Config, whole: Run, device: torch.device) -> None:
    phase: Any = next(iter(settings.phases.values()))
    order = whole.sampler(0)
    loaded = [whole.loader.load(order.batch(step), 0) for step in range(min(STEPS, order.steps_per_epoch))]
    batches = [loaded[step % len(loaded)] for step in range(STEPS)]
    classes, rate = len(whole.data.shards.classes), whole.data.train.sample_rate_hz
    # Counted apart from the step, since counters refuse the fused attention over the bank.
    operations = count_operations(settings, rate, classes, batches[0])
    results.add_value("operations of a step, encoders and heads", operations / 1e9, "GFLOP")
    losses = contrastive_losses(whole, phase)
    whole.engine.train()

    def ours() -> None:
        for number, batch in enumerate(batches):
            rate = settings.optim.lr * lr_factor(number / 100, 0.1, 0.0)
            whole.engine.set_lr(rate, rate)
            found = losses(batch, 0.5)
            whole.engine.backward(found["loss"])
            whole.engine.step()

    if device.type == "cuda":  # Before there is another model.
        torch.cuda.reset_peak_memory_stats(device)
        ours()
        results.add_value("peak memory of the GPU", torch.cuda.max_memory_allocated(device) / 2**30, "GiB")
    engine = BareEngine(settings, lambda: AVModel(settings.model, settings.data, rate, classes), device)
    bank = Bank(
        len(whole.data.train),
        settings.model.embed_dim,
        settings.memory_bank.momentum,
        device,
        num_categories=classes,
        dtype=whole.bank.dtype,
    )
    bare: Any = dataclasses.replace(whole, engine=engine, bank=bank)  # type: ignore[arg-type]
    bare_losses = contrastive_losses(bare, phase)
    engine.model.train()

    def by_hand() -> None:
        for batch in batches:
            engine.update(bare_losses(batch, 0.5)["loss"])

    seconds = setting.interleaved({"distav": ours, "bare PyTorch loop": by_hand})
    work = len(batches) * settings.optim.global_batch
    results.add_times(seconds, {name: (work, "clips/s") for name in seconds})
    results.add_ratio("distav / bare PyTorch loop", (seconds["distav"], seconds["bare PyTorch loop"]), "<= 1.05")
    peak = matmul_rate(setting, device)
    results.add_value("rate of a square matrix product", peak / 1e9, "GFLOP/s")
    share = operations * len(batches) / results.figures["distav"]["median_s"] / peak
    results.add_ratio("rate of a step / rate of a matrix product", share, ">= 0.4" if device.type == "cuda" else "")


def count_operations(settings: Config, sample_rate_hz: int, num_classes: int, batch: Batch) -> int:
    """Count the floating-point operations of encoders and heads in a step, forward and backward.

    What activation checkpointing computes again does not count, nor does the loss over the bank. Nothing is computed:
    the model is built on the meta device.
    """
    model_settings = copy.deepcopy(settings.model)
    model_settings.activation_checkpointing = False
    with torch.device("meta"):
        model = AVModel(model_settings, settings.data, sample_rate_hz, num_classes)
    media = {name: each.to("meta") for name, each in batch.media.items()}
    with FlopCounterMode(display=False) as counter:
        outputs = model(**media, seeds=batch.seeds.to("meta"))
        torch.stack([each.float().sum() for each in outputs.values()]).sum().backward()
    return counter.get_total_flops()


def matmul_rate(setting: Setting, device: torch.device) -> float:
    """Return the operations a second of a square matrix product, in bfloat16 on a GPU and float32 on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = setting.interleaved({"product": lambda: a @ a})["product"]
    return 2 * size**3 / min(seconds)
