"""What is done about numbers gone wrong: steps skipped, a run stopped, a spike of the loss rolled back."""

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
"""Scalars by name; `loss` is the one that is minimised, the others are its parts and are logged."""

REMEMBERED, FEWEST = 50, 20
"""Losses that a spike is told by, and the fewest of them."""


class AnomalyGuard:
    """Looks at each step's loss; all ranks see the same."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name
        self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=REMEMBERED)

    def passed(self) -> None:
        """Note a step that was sound."""
        self.in_a_row = 0

    def skip(self, parts: Sequence[tuple[Batch, Losses]]) -> None:
        """Tell of a step that left the weights as they were, since its loss or gradient was not finite.

        Raises:
            UserError: on every rank, after `run.max_consecutive_skipped_steps` in a row.
        """
        run = self.run
        wrong = [batch.ids[batch.valid].tolist() for batch, each in parts if not bool(torch.isfinite(each["loss"]))]
        ids = sorted({sample for rank in all_gather_objects(wrong) for some in rank for sample in some})
        self.in_a_row += 1
        run.state.report.skipped_steps += 1
        run.logger.log_metrics(run.progress.total_steps, {"train/skipped_steps": run.state.report.skipped_steps})
        what = "the gradient is not finite"
        if ids:
            what = f"the loss is not finite on {len(ids)} clips, {format_list(run.data.train.keys[ids])}"
        if run.world.is_main:
            run.logger.warn(f"phase={self.name} step {run.progress.step} is skipped: {what}")
        if self.in_a_row >= run.settings.run.max_consecutive_skipped_steps:
            raise UserError(
                f"{self.in_a_row} steps in a row of {self.name} were skipped, as many as run.max_consecutive_skipped_steps: "
                f"{what}. Weights and the last checkpoint are sound; lower optim.lr or optim.grad_clip, or mend clips."
            )

    def is_loss_spike(self, losses: Sequence[Tensor]) -> bool:
        """Whether the loss of a step, over all ranks, stands out of the last ones as far as `optim.loss_spike_factor`."""
        factor = self.run.settings.optim.loss_spike_factor
        if not factor or self.run.engine.skipped:
            return False
        loss = float(all_reduce_sum_(torch.stack(list(losses)).mean()) / get_world_size())
        usual = statistics.median(self.recent) if len(self.recent) >= FEWEST else float("inf")
        if loss > factor * usual:
            if self.run.world.is_main:
                self.run.logger.warn(
                    f"phase={self.name} step {self.run.progress.step}: the loss {loss:.3g} is over "
                    f"optim.loss_spike_factor={factor:g} times the usual {usual:.3g}"
                )
            return True
        self.recent.append(loss)
        return False

    def reset(self) -> None:
        """Start anew after the run was rolled back."""
        self.recent.clear()
        self.in_a_row = 0


def roll_back(run: Run) -> None:
    """Go back to the last checkpoint of this phase and leave out the batches from there to past the spike.

    Where there is none in this phase, the run goes on as it is.
    """
    now = run.progress
    if not run.roll_back():
        run.logger.warn("there is no checkpoint of this phase to go back to; the run goes on")
        return
    run.progress.skipped_batches += now.step - run.progress.step + run.settings.optim.loss_spike_skip_batches
    run.logger.info(
        f"back at step {run.progress.step}; {run.progress.skipped_batches} batches of this phase are left out so far"
    )
    run.save()
