"""The training loop that all phases with an optimiser share."""

import time
from collections.abc import Callable

from torch import Tensor

from distav.data.pipeline.loader import Batch
from distav.distributed.rendezvous import set_stage
from distav.training.anomaly_guard import AnomalyGuard, Losses, roll_back
from distav.training.lr_schedule import learning_rate
from distav.training.run import Run
from distav.training.step_logger import StepLogger, show_inputs


def train(
    run: Run,
    name: str,
    epochs: int,
    rates: tuple[float, float],
    losses_of: Callable[[Batch, float], Losses],
    begin_epoch: Callable[[int, float], None] | None = None,
    restart: bool = False,
) -> None:
    """Train for some epochs from where the run stands in this phase.

    Args:
        run: the run.
        name: the phase.
        epochs: passes over the training split.
        rates: learning rates of towers and heads after the warm-up.
        losses_of: computes the losses of a micro-batch; also gets the progress of the phase, 0..1.
        begin_epoch: called with the epoch and the progress before its first step.
        restart: whether the phase begins with new weights and rows.
    """
    total = epochs * run.sampler(run.progress.phase).steps_per_epoch
    meter, guard = StepLogger(run, name, total), AnomalyGuard(run, name)
    while True:
        if restart and run.progress.step == 0:
            run.reinitialize()
        if train_until_spike(run, total, rates, losses_of, begin_epoch, meter, guard):
            return
        roll_back(run)
        guard.reset()


def train_until_spike(
    run: Run,
    total: int,
    rates: tuple[float, float],
    losses_of: Callable[[Batch, float], Losses],
    begin_epoch: Callable[[int, float], None] | None,
    meter: "StepLogger",
    guard: AnomalyGuard,
) -> bool:
    """Train to the end of the phase; returns False where a spike of the loss came before."""
    order, optim, chosen = run.sampler(run.progress.phase), run.settings.optim, run.settings
    first, per_epoch = run.progress.step, order.steps_per_epoch
    places = (step + run.progress.skipped_batches for step in range(first, total))
    micro = (
        (ids, place // per_epoch)
        for place in places
        for ids in order.micro_batches(place, run.world.rank, run.world.world_size)
    )
    run.engine.train()
    batches = iter(run.loader.batches(micro))
    try:
        for step in range(first, total):
            set_stage(f"{meter.name} step {step + 1}")
            if begin_epoch and step % per_epoch == 0:
                begin_epoch(step // per_epoch, step / total)
            factor = learning_rate((step + 1) / total, optim.warmup_fraction, optim.min_lr_fraction)
            run.engine.set_lr(rates[0] * factor, rates[1] * factor)
            parts: list[tuple[Batch, Losses]] = []
            norm: float | Tensor = 0.0
            for _ in range(optim.gradient_accumulation_steps):
                waiting = time.monotonic()
                batch = next(batches)
                meter.waited += time.monotonic() - waiting
                losses = losses_of(batch, step / total)
                run.engine.backward(losses["loss"])
                norm = run.engine.step()
                parts.append((batch, {key: value.detach() for key, value in losses.items()}))
            run.progress.step += 1
            run.progress.total_steps += 1
            if guard.is_loss_spike([each["loss"] for _, each in parts]):
                return False
            if run.engine.skipped:
                guard.skip(parts)
            else:
                guard.passed()
                meter.add([each for _, each in parts])
            if run.progress.step % chosen.run.log_every == 0 or run.progress.step == total:
                meter.report(rates[1] * factor, norm)
            if (run.progress.total_steps - 1) % chosen.monitor.media_every == 0:
                show_inputs(run, parts[-1][0])
            if run.progress.step < total:
                if run.progress.step % chosen.run.checkpoint_every == 0:
                    run.save()
                run.stop_if_requested()
    finally:
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return True
