"""Training loop shared by all phases with an optimizer."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import torch
from torch import Tensor

from distav.console import show_progress
from distav.data.pipeline.class_balance import ClassBalance
from distav.data.pipeline.loader import Batch
from distav.data.pipeline.sampler import Ids
from distav.distributed.process_group import core_for_loading
from distav.distributed.rendezvous import set_stage
from distav.training.anomaly_guard import AnomalyGuard, Losses, roll_back
from distav.training.input_log import log_inputs
from distav.training.lr_schedule import lr_factor
from distav.training.run import Run
from distav.training.step_logger import StepLogger

SMALL_NETWORK = 3_000_000
"""Number of parameters below which a network counts as small."""
MicroBatches = list[tuple[Batch, Losses]]
"""Micro-batches of one step with their detached losses."""


def train(
    run: Run,
    name: str,
    epochs: int,
    rates: tuple[float, float],
    losses_of: Callable[[Batch, float], Losses],
    begin_epoch: Callable[[int, float], None] | None = None,
    reinitialize: bool = False,
    balance: ClassBalance | None = None,
) -> None:
    """Train to the end of the current phase, from its last checkpoint if the run was restarted.

    Args:
        run: the run.
        name: name of the phase.
        epochs: passes over the training split.
        rates: learning rates of towers and heads after the warmup.
        losses_of: computes the losses of a micro-batch at a progress of the phase, 0..1.
        begin_epoch: called with the epoch and the progress before the first step of the epoch.
        reinitialize: whether the phase starts with new weights and bank embeddings.
        balance: number of draws of each sample in an epoch; None: every sample once.
    """
    loop = TrainingLoop(run, name, epochs, rates, losses_of, begin_epoch, balance)
    with core_for_loading(_loader_needs_core(run)):
        while True:
            if reinitialize and run.progress.step == 0:
                run.reinitialize()
            if loop.train_until_spike():
                return
            roll_back(run)
            loop.guard.reset()


def _loader_needs_core(run: Run) -> bool:
    """Return whether decoding limits training on a CPU: that of a small network on clips.

    There, more threads than cores would wait for one another in each operation: on two cores, two threads train the
    network of the quickstart no faster than one.
    """
    is_small = run.engine.num_parameters < SMALL_NETWORK
    return (
        run.world.device.type == "cpu"
        and not run.config.run.threads_per_rank
        and is_small
        and not run.data.train.streams
    )


class TrainingLoop:
    """Optimizer steps of one phase, with logging and checkpoints; arguments as in `train`."""

    def __init__(
        self,
        run: Run,
        name: str,
        epochs: int,
        rates: tuple[float, float],
        losses_of: Callable[[Batch, float], Losses],
        begin_epoch: Callable[[int, float], None] | None,
        balance: ClassBalance | None,
    ):
        self.run, self.name = run, name
        self.losses_of, self.begin_epoch = losses_of, begin_epoch
        self.tower_lr, self.head_lr = rates
        self.sampler = run.sampler(run.progress.phase, balance)
        self.total_steps = epochs * self.sampler.steps_per_epoch
        self.first_epoch = run.epochs_before(run.progress.phase)
        self.logger = StepLogger(run, name, self.total_steps)
        self.guard = AnomalyGuard(run, name)

    def train_until_spike(self) -> bool:
        """Train to the end of the phase; returns False if a loss spike ends training before."""
        run, steps_per_epoch = self.run, self.sampler.steps_per_epoch
        run.engine.train()
        shown = show_progress(self.total_steps, "steps", self.name, done=run.progress.step, is_logged=True)
        with closing(self._batches()) as batches, shown as counter:
            for step in range(run.progress.step, self.total_steps):
                set_stage(f"{self.name} step {step + 1}")
                if self.begin_epoch and step % steps_per_epoch == 0:
                    self.begin_epoch(step // steps_per_epoch, step / self.total_steps)
                if not self._step(step, batches):
                    return False
                counter.advance()
                if run.progress.step < self.total_steps:
                    if run.progress.step % run.config.run.checkpoint_every == 0:
                        run.save()
                    run.stop_if_requested()
        return True

    def _batches(self) -> Generator[Batch, None, None]:
        """Yield this rank's micro-batches of the remaining steps, decoded in the background."""
        run = self.run
        first, skipped = run.progress.step, run.progress.skipped_batches

        def plan() -> Iterator[tuple[Ids, Ids]]:
            for position in range(first + skipped, self.total_steps + skipped):
                yield from self.sampler.micro_batches(position, run.world.rank, run.world.world_size)

        yield from run.loader.batches(plan())

    def _step(self, step: int, batches: Iterator[Batch]) -> bool:
        """Do one optimizer step and log it; returns False if its loss is a spike."""
        run, optim = self.run, self.run.config.optim
        factor = lr_factor((step + 1) / self.total_steps, optim.warmup_fraction, optim.min_lr_fraction)
        run.engine.set_epoch(self.first_epoch + step // self.sampler.steps_per_epoch)
        run.engine.set_lr(self.tower_lr * factor, self.head_lr * factor)
        micro_batches, grad_norm = self._accumulate(step, batches)
        run.progress.step += 1
        run.progress.total_steps += 1
        losses = [micro_losses for _, micro_losses in micro_batches]
        if self.guard.is_loss_spike([micro_losses["loss"] for micro_losses in losses]):
            return False
        if run.engine.skipped:
            self.guard.record_skip(micro_batches)
        else:
            self.guard.record_success()
            self.logger.add(losses)
        if run.progress.step % run.config.run.log_every == 0 or run.progress.step == self.total_steps:
            self.logger.log(self.head_lr * factor, grad_norm)
        if (run.progress.total_steps - 1) % run.config.monitor.media_every == 0:
            log_inputs(run, micro_batches[-1][0])
        return True

    def _accumulate(self, step: int, batches: Iterator[Batch]) -> tuple[MicroBatches, Tensor]:
        """Accumulate the gradients of a step and update the weights; returns its micro-batches and gradient norm."""
        engine, grad_norm = self.run.engine, torch.zeros(())
        micro_batches: MicroBatches = []
        for _ in range(self.run.config.optim.gradient_accumulation_steps):
            wait_started = time.monotonic()
            batch = next(batches)
            self.logger.data_wait_s += time.monotonic() - wait_started
            losses = self.losses_of(batch, step / self.total_steps)
            engine.backward(losses["loss"])
            grad_norm = engine.step()
            micro_batches.append((batch, {name: value.detach() for name, value in losses.items()}))
        return micro_batches, grad_norm
