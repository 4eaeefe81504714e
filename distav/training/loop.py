"""The training loop that all phases with an optimiser share."""

import time
from collections.abc import Callable

from torch import Tensor

from distav.data.pipeline.loader import Batch
from distav.distributed.rendezvous import enter
from distav.training.anomaly_guard import Guard, Losses, roll_back
from distav.training.lr_schedule import learning_rate
from distav.training.run import Run
from distav.training.step_logger import _Meter, show_inputs


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
    total = epochs * run.order(run.position.phase).steps_per_epoch
    meter, guard = _Meter(run, name, total), Guard(run, name)
    while True:
        if restart and run.position.step == 0:
            run.restart()
        if _stretch(run, total, rates, losses_of, begin_epoch, meter, guard):
            return
        roll_back(run)
        guard.forget()


def _stretch(
    run: Run,
    total: int,
    rates: tuple[float, float],
    losses_of: Callable[[Batch, float], Losses],
    begin_epoch: Callable[[int, float], None] | None,
    meter: "_Meter",
    guard: Guard,
) -> bool:
    """Train to the end of the phase; returns False where a spike of the loss came before."""
    order, optim, chosen = run.order(run.position.phase), run.settings.optim, run.settings
    first, per_epoch = run.position.step, order.steps_per_epoch
    places = (step + run.position.passed_over for step in range(first, total))
    micro = (
        (ids, place // per_epoch)
        for place in places
        for ids in order.micro_batches(place, run.world.rank, run.world.num_ranks)
    )
    run.engine.train()
    batches = iter(run.loader.batches(micro))
    try:
        for step in range(first, total):
            enter(f"{meter.name} step {step + 1}")
            if begin_epoch and step % per_epoch == 0:
                begin_epoch(step // per_epoch, step / total)
            factor = learning_rate((step + 1) / total, optim.warmup_fraction, optim.min_lr_fraction)
            run.engine.set_lr(rates[0] * factor, rates[1] * factor)
            parts: list[tuple[Batch, Losses]] = []
            norm: float | Tensor = 0.0
            for _ in range(optim.accumulation):
                waiting = time.monotonic()
                batch = next(batches)
                meter.waited += time.monotonic() - waiting
                losses = losses_of(batch, step / total)
                run.engine.backward(losses["loss"])
                norm = run.engine.step()
                parts.append((batch, {key: value.detach() for key, value in losses.items()}))
            run.position.step += 1
            run.position.total_steps += 1
            run.position.samples += optim.global_batch
            if guard.spike([each["loss"] for _, each in parts]):
                return False
            if run.engine.skipped:
                guard.skip(parts)
            else:
                guard.passed()
                meter.add([each for _, each in parts])
            if run.position.step % chosen.run.log_every == 0 or run.position.step == total:
                meter.report(rates[1] * factor, norm)
            if (run.position.total_steps - 1) % chosen.monitor.media_every == 0:
                show_inputs(run, parts[-1][0])
            if run.position.step < total:
                if run.position.step % chosen.run.checkpoint_every == 0:
                    run.save()
                run.end_if_asked()
    finally:
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return True
