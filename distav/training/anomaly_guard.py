"""Handling of non-finite losses and gradients, and of loss spikes."""

import statistics
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from distav.config.errors import UserError, format_list
from distav.data.pipeline.loader import Batch
from distav.distributed.collectives import all_gather_objects, all_reduce_sum_, get_world_size
from distav.training.run import Run

Losses = dict[str, Tensor]
"""Scalars by name: `loss`, which is minimized, and its logged parts."""

WINDOW, MIN_WINDOW = 50, 20
"""Number of recent losses whose median a spike is compared with, and the number below which nothing is a spike."""


class AnomalyGuard:
    """Checks the loss of each step of a phase; all ranks come to the same result."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name
        self._consecutive_skips = 0
        self._recent_losses: deque[float] = deque(maxlen=WINDOW)

    def record_success(self) -> None:
        """Record a step that updated the weights."""
        self._consecutive_skips = 0

    def record_skip(self, micro_batches: Sequence[tuple[Batch, Losses]]) -> None:
        """Log a step that was skipped because its loss or gradient was not finite.

        Args:
            micro_batches: batches and losses of the step.

        Raises:
            UserError: on all ranks, after `run.max_consecutive_skipped_steps` skipped steps in a row.
        """
        run = self.run
        run.state.report.skipped_steps += 1
        self._consecutive_skips += 1
        run.logger.log_metrics(run.progress.total_steps, {"train/skipped_steps": run.state.report.skipped_steps})
        ids = _samples_with_non_finite_loss(micro_batches)
        reason = "the gradient is not finite"
        if ids:
            reason = f"the loss is not finite on {len(ids)} clips, {format_list(run.data.train.keys[ids])}"
        if run.world.is_main:
            run.logger.warn(f"phase={self.name} step {run.progress.step} skipped: {reason}")
        if self._consecutive_skips >= run.config.run.max_consecutive_skipped_steps:
            raise UserError(
                f"{self._consecutive_skips} steps in a row of phase {self.name} were skipped, the limit "
                f"run.max_consecutive_skipped_steps: {reason}. The weights and the last checkpoint are valid. Lower "
                "optim.lr or optim.grad_clip, or fix the named clips."
            )

    def is_loss_spike(self, losses: Sequence[Tensor]) -> bool:
        """Whether the mean loss of a step exceeds `optim.loss_spike_factor` times the median of recent steps.

        Args:
            losses: one scalar per micro-batch.
        """
        factor = self.run.config.optim.loss_spike_factor
        if not factor or self.run.engine.skipped:
            return False
        loss = float(all_reduce_sum_(torch.stack(list(losses)).mean()) / get_world_size())
        enough = len(self._recent_losses) >= MIN_WINDOW
        median = statistics.median(self._recent_losses) if enough else float("inf")
        if loss > factor * median:
            if self.run.world.is_main:
                self.run.logger.warn(
                    f"phase={self.name} step {self.run.progress.step}: loss {loss:.3g} exceeds "
                    f"optim.loss_spike_factor={factor:g} times the median {median:.3g}"
                )
            return True
        self._recent_losses.append(loss)
        return False

    def reset(self) -> None:
        """Clear recent losses and skipped steps, after a rollback."""
        self._recent_losses.clear()
        self._consecutive_skips = 0


def _samples_with_non_finite_loss(micro_batches: Sequence[tuple[Batch, Losses]]) -> list[int]:
    local = [
        batch.ids[batch.valid].tolist() for batch, losses in micro_batches if not bool(torch.isfinite(losses["loss"]))
    ]
    return sorted({sample for rank in all_gather_objects(local) for batch in rank for sample in batch})


def roll_back(run: Run) -> None:
    """Restore the last checkpoint of this phase and skip the batches from there to after the loss spike.

    Without a checkpoint of this phase, training continues with the current weights.
    """
    spike_step = run.progress.step
    if not run.roll_back():
        run.logger.warn("No checkpoint of this phase to roll back to; training continues.")
        return
    run.progress.skipped_batches += spike_step - run.progress.step + run.config.optim.loss_spike_skip_batches
    run.logger.info(
        f"rolled back to step {run.progress.step}; {run.progress.skipped_batches} batches of this phase skipped so far"
    )
    run.save()
