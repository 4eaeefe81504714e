"""Console lines and scalars of training steps."""

import time

import torch
from torch import Tensor

from distav.console import format_duration
from distav.distributed.collectives import all_reduce_sum_, get_world_size
from distav.training.anomaly_guard import Losses
from distav.training.metric_logger import peak_memory_gib
from distav.training.run import Run


class StepLogger:
    """Averages losses and times over the steps between two console lines of a phase.

    Attributes:
        data_wait_s: seconds that training waited for batches since the last line; the loop adds to it.
    """

    def __init__(self, run: Run, name: str, total_steps: int):
        self.run, self.name, self.total_steps = run, name, total_steps
        self._started, self._first_step = time.monotonic(), run.progress.step
        self._reset()

    def _reset(self) -> None:
        self._line_started, self.data_wait_s = time.monotonic(), 0.0
        self._losses: list[Losses] = []

    def add(self, losses: list[Losses]) -> None:
        """Add the losses of a step, one entry per micro-batch."""
        self._losses += losses

    def log(self, lr: float, grad_norm: Tensor) -> None:
        """Log the means over ranks and over the steps since the last call.

        This is the only place in a step where the CPU waits for the GPU: logged values stay tensors until here.
        """
        run, norm = self.run, float(grad_norm)
        if not self._losses:  # All steps were skipped; the anomaly guard has logged them.
            return
        losses = self._mean_losses()
        elapsed_s = max(time.monotonic() - self._line_started, 1e-9)
        steps = len(self._losses) / run.config.optim.gradient_accumulation_steps
        scalars = {
            **{f"train/{name}": value for name, value in losses.items()},
            "train/lr": lr,
            "train/grad_norm": norm,
            "time/clips_per_s": steps * run.config.optim.global_batch / elapsed_s,
            "time/data_wait_pct": 100 * self.data_wait_s / elapsed_s,
            "memory/peak_gib": peak_memory_gib(run.world.device),
            "data/quarantined_samples": len(run.enforce_quarantine_limit()),
        }
        run.logger.info(self._line(losses, scalars))
        record = {"phase": self.name, "phase_step": run.progress.step, **scalars}
        run.logger.log_metrics(run.progress.total_steps, record)
        self._reset()

    def _mean_losses(self) -> dict[str, float]:
        names = list(self._losses[0])
        means = [torch.stack([losses[name].float() for losses in self._losses]).mean() for name in names]
        totals = all_reduce_sum_(torch.stack(means)) / get_world_size()
        return dict(zip(names, totals.tolist(), strict=True))

    def _line(self, losses: dict[str, float], scalars: dict[str, float]) -> str:
        step = self.run.progress.step
        seconds_per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        fields = [
            f"step {step}/{self.total_steps} phase={self.name}",
            *(f"{name}={value:.3f}" for name, value in losses.items()),
            f"lr={scalars['train/lr']:.1e}",
            f"grad_norm={scalars['train/grad_norm']:.2f}",
            f"data_wait={scalars['time/data_wait_pct']:.0f}%",
            f"{scalars['time/clips_per_s']:.0f} clips/s",
            f"{scalars['memory/peak_gib']:.1f}GiB",
        ]
        if scalars["data/quarantined_samples"]:
            fields.append(f"quarantined={scalars['data/quarantined_samples']}")
        fields.append(f"eta {format_duration(seconds_per_step * (self.total_steps - step))}")
        return " ".join(fields)
