"""A training run: config, data, engine, memory bank, checkpoints and progress."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from distav.config.errors import UserError
from distav.config.schema import Config
from distav.console import show_progress
from distav.data.data_module import DataModule
from distav.data.dataset import Split
from distav.data.pipeline.class_balance import ClassBalance
from distav.data.pipeline.loader import Batch, Loader, Quarantine
from distav.data.pipeline.sampler import PADDING, GlobalBatchSampler, Ids, micro_batch_size
from distav.distributed.collectives import all_gather_objects
from distav.distributed.delayed_vote import DelayedVote
from distav.distributed.process_group import World
from distav.distributed.signals import Interrupted, ShutdownRequest
from distav.evaluation.inference import iter_outputs
from distav.memory.bank import Bank
from distav.training.checkpoint.manager import CheckpointManager
from distav.training.engine.deepspeed_engine import Engine
from distav.training.metric_logger import MetricLogger
from distav.training.run_state import Progress, RunState


@dataclass
class Run:
    """A run in progress, as passed to the phases.

    Attributes:
        config: config of the run.
        world: rank, world size and device.
        folder: the run directory.
        data: training and test split with their labels.
        logger: console, metrics.jsonl and TensorBoard.
        engine: the network and its optimizer.
        bank: the memory bank.
        loader: reads training batches of this rank.
        checkpoints: saves and restores the run.
        shutdown: whether a signal requested the end of the run.
        progress: current phase and step.
        state: state that phases pass to later phases and to the report.
    """

    config: Config
    world: World
    folder: Path
    data: DataModule
    logger: MetricLogger
    engine: Engine
    bank: Bank
    loader: Loader
    checkpoints: CheckpointManager
    shutdown: ShutdownRequest
    progress: Progress
    state: RunState
    _phase_started: float = field(default_factory=time.monotonic)
    _stop_vote: DelayedVote = field(default_factory=DelayedVote)

    @property
    def micro_batch(self) -> int:
        """Number of samples of this rank in a micro-batch."""
        optim = self.config.optim
        return micro_batch_size(optim.global_batch, optim.gradient_accumulation_steps, self.world.world_size)

    def epochs_before(self, phase: int) -> int:
        """Return the number of epochs in the phases before one, given by its number."""
        return sum(getattr(earlier, "epochs", 0) for earlier in list(self.config.phases.values())[:phase])

    def sampler(self, phase: int, balance: ClassBalance | None = None) -> GlobalBatchSampler:
        """Return the sampler of a phase, given by its number, and by the number of draws of each sample."""
        config, sizes = self.config, self.data.train.shard_sizes
        seed = config.run.seed * 1000 + phase
        return GlobalBatchSampler(
            sizes,
            seed,
            config.data.shuffle_block_shards,
            config.optim.global_batch,
            config.optim.gradient_accumulation_steps,
            balance,
        )

    def start_phase_timer(self, reset: bool = False) -> None:
        """Start the timer of a phase.

        Args:
            reset: start at 0; otherwise at the time of the last checkpoint inside the phase.
        """
        if reset:
            self.state.seconds_in_phase = 0.0
        self._phase_started = time.monotonic() - self.state.seconds_in_phase

    def seconds_in_phase(self) -> float:
        """Return the seconds spent in this phase; across restarts, time after the last checkpoint does not count."""
        return time.monotonic() - self._phase_started

    def save(self) -> None:
        """Save a checkpoint; it is written in the background.

        A checkpoint that cannot be written, or not copied to the mirror, is logged when the next one is saved; training
        continues.
        """
        started = time.monotonic()
        self.state.seconds_in_phase = self.seconds_in_phase()
        self.state.quarantined = self.quarantined_samples()
        self.state.metrics_bytes = self.logger.metrics_bytes
        if self.checkpoints.mirror:
            self.logger.flush()
        errors = self.checkpoints.save(self.progress, self.engine, self.bank, self.state)
        if errors and self.world.is_main:
            self.logger.warn(f"Failed to write a checkpoint: {'; '.join(errors)}. Training continues without it.")
        if upload_error := self.checkpoints.take_upload_error():
            self.logger.warn(
                f"Failed to copy a checkpoint to the mirror: {upload_error} Training continues; the next checkpoint is "
                "copied again."
            )
        waited = time.monotonic() - started
        stats = self.state.report.checkpointing
        stats.checkpoints += 1
        stats.seconds = round(stats.seconds + waited, 3)
        times = {"time/checkpoint_s": waited, "time/checkpoint_write_s": self.checkpoints.write_s}
        self.logger.log_metrics(self.progress.total_steps, times)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: if it could not be written.
        """
        if errors := self.checkpoints.wait():
            raise UserError(
                f"Failed to write the final checkpoint: {'; '.join(errors)}. Free disk space or fix the directory "
                "permissions, then rerun the same command to resume."
            )

    def finish_uploading(self) -> None:
        """Wait until the last checkpoint and the results are in the mirror of the run, if it has one.

        Raises:
            UserError: if they could not be copied.
        """
        self.logger.flush()
        self.checkpoints.finish_uploading()

    def roll_back(self) -> bool:
        """Restore the last checkpoint of this phase; returns False if there is none."""
        self.finish_saving()
        restored = self.checkpoints.restore(self.engine, self.bank, self.logger.warn, self.progress.phase)
        if restored:
            self.progress, self.state = restored
            self.logger.resume_at(self.progress.total_steps, self.state.metrics_bytes)
            self.start_phase_timer()
        return restored is not None

    def reinitialize(self) -> None:
        """Reinitialize the weights and the bank embeddings; corrected labels and correspondence estimates are kept."""
        self.engine.reinitialize(self.config.run.seed * 1000 + self.progress.phase)
        self.bank.reinitialize()
        self.state.nce_partition = None
        self.state.given_labels_learned = False

    def stop_if_requested(self) -> None:
        """Save a checkpoint and end the run on all ranks if a signal requested it on any rank.

        With several ranks, the run ends one call after the signal.

        Raises:
            Interrupted: after the checkpoint is on disk.
        """
        if self._stop_vote(self.shutdown.requested):
            self.save()
            self.finish_saving()
            self.finish_uploading()
            raise Interrupted(f"stop requested; checkpoint saved after step {self.progress.total_steps}")

    def quarantined_samples(self) -> dict[int, str]:
        """Return the reason for each training sample that any rank quarantined, by sample number."""
        reasons: dict[int, str] = {}
        for rank_reasons in all_gather_objects(dict(self.loader.quarantine.reasons)):
            reasons |= rank_reasons
        return dict(sorted(reasons.items()))

    def enforce_quarantine_limit(self) -> dict[int, str]:
        """Return the quarantined samples of all ranks.

        Raises:
            UserError: if they exceed `data.max_quarantined_fraction`; names the first of them.
        """
        reasons, max_fraction = self.quarantined_samples(), self.config.data.max_quarantined_fraction
        self.loader.quarantine.reasons.update(reasons)
        if len(reasons) > max_fraction * len(self.data.train):
            keys = self.data.train.keys
            first = "; ".join(f"{keys[sample]}: {reason}" for sample, reason in list(reasons.items())[:3])
            raise UserError(
                f"{len(reasons)} of {len(self.data.train)} training samples are quarantined, more than "
                f"data.max_quarantined_fraction={max_fraction:g}: {first}. Fix the shards or raise the limit."
            )
        return reasons

    def iter_outputs(
        self, split: Split, batches: Sequence[Ids], quarantine: Quarantine | None = None, **options: bool
    ) -> Generator[tuple[Ids, Batch, dict[str, Tensor]], None, None]:
        """Yield ids, batch and outputs of one pass in evaluation mode; the engine is in training mode afterwards.

        Args:
            split: the split.
            batches: this rank's padded batches of ids; their number is equal on all ranks.
            quarantine: records samples that cannot be read; a new one by default.
            options: passed to the network's forward.
        """
        config = self.config
        loader = Loader(split, config.data, None, config.run.seed, self.micro_batch, self.world.device)
        loader.quarantine = quarantine or loader.quarantine
        self.engine.train(False)
        num_clips = sum(int((ids != PADDING).sum()) for ids in batches)
        try:
            with show_progress(num_clips, "clips", f"evaluating {split.name}") as counter:
                for ids, batch, outputs in iter_outputs(lambda batch: self.engine(batch, **options), loader, batches):
                    yield ids, batch, outputs
                    counter.advance(int((ids != PADDING).sum()))
        finally:
            loader.close()
            self.engine.train()
