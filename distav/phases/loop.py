"""The training loop that all phases with an optimiser share."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distav.data.loader import Batch
from distav.errors import UserError
from distav.monitor import clock, peak_memory_gib
from distav.run import Run
from distav.world import any_rank, num_ranks, sum_

Losses = dict[str, Tensor]
"""Scalars by name; `loss` is the one that is minimised, the others are its parts and are logged."""


def learning_rate(progress: float, warmup: float, floor: float) -> float:
    """Return the factor on the learning rate: a linear rise, then a cosine down to `floor`; progress is 0..1."""
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / max(1 - warmup, 1e-9)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def train(
    run: Run,
    name: str,
    epochs: int,
    rates: tuple[float, float],
    losses_of: Callable[[Batch, float], Losses],
    begin_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train for some epochs from where the run stands in this phase.

    Args:
        run: the run.
        name: the phase.
        epochs: passes over the training split.
        rates: learning rates of towers and heads after the warm-up.
        losses_of: computes the losses of a micro-batch; also gets the progress of the phase, 0..1.
        begin_epoch: called with the epoch and the progress before its first step.
    """
    order, optim = run.order(run.position.phase), run.settings.optim
    total = epochs * order.steps_per_epoch
    first = run.position.step
    micro = (
        (ids, step // order.steps_per_epoch)
        for step in range(first, total)
        for ids in order.micro_batches(step, run.world.rank, run.world.num_ranks)
    )
    meter = _Meter(run, name, total)
    run.engine.train()
    batches = iter(run.loader.batches(micro))
    for step in range(first, total):
        if begin_epoch and step % order.steps_per_epoch == 0:
            begin_epoch(step // order.steps_per_epoch, step / total)
        factor = learning_rate((step + 1) / total, optim.warmup_fraction, optim.min_lr_fraction)
        run.engine.set_lr(rates[0] * factor, rates[1] * factor)
        parts: list[Losses] = []
        norm = 0.0
        for _ in range(optim.accumulation):
            waiting = time.monotonic()
            batch = next(batches)
            meter.waited += time.monotonic() - waiting
            losses = losses_of(batch, step / total)
            run.engine.backward(losses["loss"])
            norm = run.engine.step()
            parts.append({key: value.detach() for key, value in losses.items()})
        run.position.step += 1
        run.position.total_steps += 1
        run.position.samples += optim.global_batch
        meter.add(parts)
        if run.position.step % run.settings.run.log_every == 0 or run.position.step == total:
            meter.report(rates[1] * factor, norm)
        if (run.position.total_steps - 1) % run.settings.monitor.media_every == 0:
            show_inputs(run, batch)
        if run.position.step % run.settings.run.checkpoint_every == 0 and run.position.step < total:
            require_finite(run, name, losses["loss"])
            run.save()
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def show_inputs(run: Run, batch: Batch) -> None:
    """Put some clips of a batch, as fed to the model, on TensorBoard."""
    some = run.settings.monitor.media_clips
    if run.world.is_main and some:
        sound = batch.sound[:some]
        # Called past its hooks, which at ZeRO-3 expect every rank.
        spectrogram = run.engine.model.get_submodule("audio.front").forward(sound)
        rate = run.data.train.sample_rate_hz
        run.monitor.media(batch.frames[:some], sound, spectrogram, rate, run.position.total_steps)


def require_finite(run: Run, name: str, loss: Tensor) -> None:
    """Stop all ranks where the loss of any is not a number.

    Raises:
        UserError: on every rank.
    """
    if any_rank(not bool(torch.isfinite(loss))):
        raise UserError(
            f"the loss is not finite at step {run.position.step} of {name}; the last checkpoint is sound. "
            "Lower optim.lr or optim.grad_clip and start under another run.name."
        )


class _Meter:
    """Gathers what is told about the steps since the last line."""

    def __init__(self, run: Run, name: str, total: int):
        self.run, self.name, self.total = run, name, total
        self.began = time.monotonic()
        self.first = run.position.step
        self._reset()

    def _reset(self) -> None:
        self.since, self.waited, self.parts = time.monotonic(), 0.0, []

    def add(self, parts: list[Losses]) -> None:
        """Note the losses of a step's micro-batches."""
        self.parts += parts

    def report(self, lr: float, norm: float) -> None:
        """Write a line, averaged over ranks and over the steps since the last one."""
        run = self.run
        keys = list(self.parts[0])
        means = torch.stack([torch.stack([part[key].float() for part in self.parts]).mean() for key in keys])
        means = sum_(means) / num_ranks()
        values = dict(zip(keys, means.tolist(), strict=True))
        require_finite(run, self.name, means[keys.index("loss")])
        elapsed = max(time.monotonic() - self.since, 1e-9)
        steps = len(self.parts) / run.settings.optim.accumulation
        rate = steps * run.settings.optim.global_batch / elapsed
        wait = 100 * self.waited / elapsed
        bad = len(run.check_budget())
        memory = peak_memory_gib(run.world.device)
        done = run.position.step
        remaining = (time.monotonic() - self.began) / max(1, done - self.first) * (self.total - done)
        extra = " ".join(f"{key}={value:.3f}" for key, value in values.items() if key != "loss")
        run.monitor.say(
            f"step {done}/{self.total} phase={self.name} loss={values['loss']:.3f} {extra} lr={lr:.1e} grad={norm:.2f} "
            f"data={wait:.0f}% {rate:.0f} clips/s {memory:.1f}GiB"
            + (f" bad={bad}" if bad else "")
            + f" eta {clock(remaining)}"
        )
        scalars = {f"train/{key}": value for key, value in values.items()}
        scalars |= {
            "train/lr": lr,
            "train/grad_norm": norm,
            "time/clips_per_s": rate,
            "time/data_wait_pct": wait,
            "memory/peak_gib": memory,
            "data/skipped_total": bad,
        }
        run.monitor.record(run.position.total_steps, {"phase": self.name, "phase_step": done, **scalars})
        self._reset()
