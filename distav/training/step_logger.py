"""Console lines, scalars and media of training steps."""

import time

import torch
from torch import Tensor

from distav.data.pipeline.loader import Batch
from distav.distributed.collectives import all_reduce_sum_, get_world_size
from distav.training.anomaly_guard import Losses
from distav.training.metric_logger import clock, peak_memory_gib
from distav.training.run import Run


def show_inputs(run: Run, batch: Batch) -> None:
    """Put some clips of a batch, as fed to the model, on TensorBoard."""
    some = run.settings.monitor.media_clips
    if run.world.is_main and some and "frames" in batch.media:
        frames, sound = (batch.media[name][:some] for name in ("frames", "audio"))
        # Called past its hooks, which at ZeRO-3 expect every rank.
        spectrogram = run.engine.model.get_submodule("audio.front").forward(sound)
        rate = run.data.train.sample_rate_hz
        run.logger.media(frames, sound, spectrogram, rate, run.progress.total_steps)


class StepLogger:
    """Gathers what is told about the steps since the last line."""

    def __init__(self, run: Run, name: str, total: int):
        self.run, self.name, self.total = run, name, total
        self.began = time.monotonic()
        self.first = run.progress.step
        self._reset()

    def _reset(self) -> None:
        self.since, self.waited, self.parts = time.monotonic(), 0.0, []

    def add(self, parts: list[Losses]) -> None:
        """Note the losses of a step's micro-batches."""
        self.parts += parts

    def report(self, lr: float, norm: float | Tensor) -> None:
        """Write a line, averaged over ranks and over the steps since the last one.

        The CPU waits here for the GPU, and nowhere else in a step: values that are logged stay tensors until now.
        """
        run, norm = self.run, float(norm)
        if not self.parts:  # All steps were skipped, and told.
            return
        keys = list(self.parts[0])
        means = torch.stack([torch.stack([part[key].float() for part in self.parts]).mean() for key in keys])
        means = all_reduce_sum_(means) / get_world_size()
        values = dict(zip(keys, means.tolist(), strict=True))
        elapsed = max(time.monotonic() - self.since, 1e-9)
        steps = len(self.parts) / run.settings.optim.gradient_accumulation_steps
        rate = steps * run.settings.optim.global_batch / elapsed
        wait = 100 * self.waited / elapsed
        bad = len(run.enforce_quarantine_limit())
        memory = peak_memory_gib(run.world.device)
        done = run.progress.step
        remaining = (time.monotonic() - self.began) / max(1, done - self.first) * (self.total - done)
        extra = " ".join(f"{key}={value:.3f}" for key, value in values.items() if key != "loss")
        run.logger.info(
            f"step {done}/{self.total} phase={self.name} loss={values['loss']:.3f} {extra} lr={lr:.1e} grad_norm={norm:.2f} "
            f"data_wait={wait:.0f}% {rate:.0f} clips/s {memory:.1f}GiB"
            + (f" quarantined={bad}" if bad else "")
            + f" eta {clock(remaining)}"
        )
        scalars = {f"train/{key}": value for key, value in values.items()}
        scalars |= {
            "train/lr": lr,
            "train/grad_norm": norm,
            "time/clips_per_s": rate,
            "time/data_wait_pct": wait,
            "memory/peak_gib": memory,
            "data/quarantined_samples": bad,
        }
        run.logger.log_metrics(run.progress.total_steps, {"phase": self.name, "phase_step": done, **scalars})
        self._reset()
