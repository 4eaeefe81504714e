"""The training loop that all phases with an optimiser share."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distav.data.pipeline.loader import Batch
from distav.distributed.collectives import num_ranks, sum_
from distav.distributed.rendezvous import enter
from distav.monitor import clock, peak_memory_gib
from distav.phases.guard import Guard, Losses, roll_back
from distav.run import Run


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


def show_inputs(run: Run, batch: Batch) -> None:
    """Put some clips of a batch, as fed to the model, on TensorBoard."""
    some = run.settings.monitor.media_clips
    if run.world.is_main and some and "frames" in batch.media:
        frames, sound = (batch.media[name][:some] for name in ("frames", "sound"))
        # Called past its hooks, which at ZeRO-3 expect every rank.
        spectrogram = run.engine.model.get_submodule("audio.front").forward(sound)
        rate = run.data.train.sample_rate_hz
        run.monitor.media(frames, sound, spectrogram, rate, run.position.total_steps)


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

    def report(self, lr: float, norm: float | Tensor) -> None:
        """Write a line, averaged over ranks and over the steps since the last one.

        The CPU waits here for the GPU, and nowhere else in a step: values that are logged stay tensors until now.
        """
        run, norm = self.run, float(norm)
        if not self.parts:  # All steps were skipped, and told.
            return
        keys = list(self.parts[0])
        means = torch.stack([torch.stack([part[key].float() for part in self.parts]).mean() for key in keys])
        means = sum_(means) / num_ranks()
        values = dict(zip(keys, means.tolist(), strict=True))
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
