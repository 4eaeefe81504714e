"""What a phase works on: the settings, the data, the engine, the bank, and where the run stands."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distav.config.errors import UserError, format_list
from distav.config.phases import ContrastivePhase, EventParsingPhase
from distav.config.schema import Config
from distav.data.annotations.events import num_segments
from distav.data.data_module import DataModule
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import GlobalBatchSampler, micro_batch_size
from distav.distributed.collectives import all_gather_objects, any_across_ranks
from distav.distributed.process_group import World
from distav.distributed.rendezvous import keep_records
from distav.distributed.signals import Interrupted, ShutdownRequest, handle_signals
from distav.memory.bank import Bank
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser
from distav.models.pretrained import load_weights
from distav.training.checkpoint.manager import CheckpointManager, Progress
from distav.training.engine.deepspeed_engine import Engine, trains_in_bf16
from distav.training.metric_logger import MetricLogger
from distav.training.run_dir import lock_run_dir
from distav.training.run_state import RunState


@dataclass
class Run:
    """A run in progress."""

    settings: Config
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
    _phase_began: float = field(default_factory=time.monotonic)

    @property
    def micro_batch(self) -> int:
        """Samples of this rank in a micro-batch."""
        optim = self.settings.optim
        return micro_batch_size(optim.global_batch, optim.gradient_accumulation_steps, self.world.world_size)

    def sampler(self, phase: int) -> GlobalBatchSampler:
        """Return the order of samples of a phase."""
        settings, sizes = self.settings, self.data.train.shard_sizes
        seed = settings.run.seed * 1000 + phase
        return GlobalBatchSampler(
            sizes,
            seed,
            settings.data.shuffle_block_shards,
            settings.optim.global_batch,
            settings.optim.gradient_accumulation_steps,
        )

    def start_phase_timer(self, reset: bool = False) -> None:
        """Start the clock of a phase: where a killed run left it, or afresh after another phase."""
        if reset:
            self.state.seconds_in_phase = 0.0
        self._phase_began = time.monotonic() - self.state.seconds_in_phase

    def seconds_in_phase(self) -> float:
        """Return the seconds spent in this phase, those before a kill included up to the last checkpoint."""
        return time.monotonic() - self._phase_began

    def save(self) -> None:
        """Take a checkpoint; it is written while the run goes on. One that could not be written is told and missed."""
        began = time.monotonic()
        self.state.seconds_in_phase = self.seconds_in_phase()
        self.state.quarantined = self.quarantined_samples()
        faults = self.checkpoints.save(self.progress, self.engine, self.bank, self.state)
        if faults and self.world.is_main:
            self.logger.warn(f"a checkpoint could not be written, the run goes on without it: {'; '.join(faults)}")
        waited = time.monotonic() - began
        stats = self.state.report.checkpointing
        stats.checkpoints += 1
        stats.seconds = round(stats.seconds + waited, 3)
        times = {"time/checkpoint_s": waited, "time/checkpoint_write_s": self.checkpoints.write_s}
        self.logger.log_metrics(self.progress.total_steps, times)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: where it could not be written.
        """
        if faults := self.checkpoints.wait():
            raise UserError(
                f"the last checkpoint could not be written: {'; '.join(faults)}. Make room, or mend the rights, and "
                "give the same command again."
            )

    def roll_back(self) -> bool:
        """Go back to the last checkpoint of this phase; returns False where there is none."""
        self.finish_saving()
        found = self.checkpoints.restore(self.engine, self.bank, self.logger.warn, self.progress.phase)
        if found:
            self.progress, self.state = found
            self.start_phase_timer()
        return found is not None

    def reinitialize(self) -> None:
        """Begin a phase with new weights and rows of the bank; of earlier phases the labels and pairs found stay."""
        self.engine.reinitialize(self.settings.run.seed * 1000 + self.progress.phase)
        self.bank.reinitialize()
        self.state.nce_partition = None
        self.state.given_labels_learned = False

    def stop_if_requested(self) -> None:
        """Save and end the run on all ranks where any was asked to.

        Raises:
            Interrupted: when the checkpoint is on disk.
        """
        if any_across_ranks(self.shutdown.requested):
            self.save()
            self.finish_saving()
            raise Interrupted(f"asked to end; saved after step {self.progress.total_steps}")

    def quarantined_samples(self) -> dict[int, str]:
        """Return every training sample that any rank could not use, and why."""
        reasons: dict[int, str] = {}
        for part in all_gather_objects(dict(self.loader.quarantine.reasons)):
            reasons |= part
        return dict(sorted(reasons.items()))

    def enforce_quarantine_limit(self) -> dict[int, str]:
        """Stop the run where too many samples are bad; returns them.

        Raises:
            UserError: naming the first of them and the reasons.
        """
        bad, most = self.quarantined_samples(), self.settings.data.max_quarantined_fraction
        self.loader.quarantine.reasons.update(bad)
        if len(bad) > most * len(self.data.train):
            first = "; ".join(f"{self.data.train.keys[sample]}: {reason}" for sample, reason in list(bad.items())[:3])
            raise UserError(
                f"{len(bad)} of {len(self.data.train)} training samples cannot be used, more than "
                f"data.max_quarantined_fraction={most:g}: {first}. Mend the shards or allow a larger share."
            )
        return bad


@contextmanager
def open_run(settings: Config, world: World) -> Iterator[Run]:
    """Open a run, new or where it was left.

    Raises:
        UserError: for settings or data that do not go together, or a folder that holds another run.
    """
    data = DataModule.open(settings)
    folder = Path(settings.run.root) / settings.run.name
    with ExitStack() as stack:
        stack.enter_context(lock_run_dir(folder, settings, world))
        keep_records(folder / "logs" / "collectives")
        monitor = MetricLogger(folder, world)
        stack.callback(monitor.close)
        engine = Engine(lambda: _model(settings, data), settings, world)
        bank = _bank(settings, world, len(data.train), len(data.shards.classes))
        checkpoints = CheckpointManager(folder / "checkpoints", settings.run.keep_checkpoints)
        progress, state = checkpoints.restore(engine, bank, monitor.warn) or _start(engine, settings, monitor)
        micro = micro_batch_size(
            settings.optim.global_batch, settings.optim.gradient_accumulation_steps, world.world_size
        )
        loader = Loader(data.train, settings.data, settings.augment, settings.run.seed, micro, world.device)
        stack.callback(loader.close)
        loader.quarantine.reasons |= state.quarantined
        stop = stack.enter_context(handle_signals())
        run = Run(settings, world, folder, data, monitor, engine, bank, loader, checkpoints, stop, progress, state)
        _log_startup(run)
        yield run
        run.finish_saving()


def _model(settings: Config, data: DataModule) -> AVModel | FeatureParser:
    num_classes, segments = len(data.shards.classes), num_segments(data.train)
    if data.train.streams:
        return FeatureParser(settings.model.parser, data.train.streams, segments, num_classes)
    parses = any(isinstance(phase, EventParsingPhase) for phase in settings.phases.values())
    rate = data.train.sample_rate_hz
    return AVModel(settings.model, settings.data, rate, num_classes, segments if parses else 0)


def _start(engine: Engine, settings: Config, monitor: MetricLogger) -> tuple[Progress, RunState]:
    """Begin a run, with the weights of an earlier one where they are asked for."""
    source = settings.model.pretrained
    if source:
        try:
            offered = load_weights(Path(source).expanduser())
        except UserError as error:
            raise UserError(f"model.pretrained={source}: {error}") from None
        taken = engine.reinitialize(settings.run.seed, offered)
        if not taken:
            raise UserError(
                f"model.pretrained={source}: none of its weights fits this network; take its `model` settings."
            )
        left = sorted({name.split(".")[0] for name in set(offered) - set(taken)})
        monitor.info(f"starts from {source}" + (f", all but {format_list(left)}" if left else ""))
    return Progress(), RunState()


def _bank(settings: Config, world: World, num_samples: int, num_classes: int) -> Bank:
    size = 2 * num_samples * settings.model.embed_dim * 4
    contrastive = [phase for phase in settings.phases.values() if isinstance(phase, ContrastivePhase)]
    remembers = any(phase.category_memory_weight for phase in contrastive)
    return Bank(
        num_samples,
        settings.model.embed_dim,
        settings.memory_bank.momentum,
        world.device,
        settings.run.seed,
        num_categories=(settings.model.num_categories or num_classes) if remembers else 0,
        replicated=size <= settings.memory_bank.replicate_below_mib * 2**20,
        dtype=torch.bfloat16 if world.device.type == "cuda" and trains_in_bf16(settings, world) else torch.float32,
    )


def _log_startup(run: Run) -> None:
    data, settings = run.data, run.settings
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in run.engine.model.parameters())
    run.logger.info(
        f"{run.folder}: {len(data.train)} training clips in {len(data.shards.classes)} classes, "
        f"{parameters / 1e6:.1f}M parameters, {run.world.world_size} rank(s) on {run.world.device.type}, "
        f"ZeRO {run.engine.stage}, phases: {', '.join(settings.phases)}"
    )
    if run.progress.total_steps or run.progress.phase:
        names = [*settings.phases, "the end"]
        run.logger.info(f"going on in {names[run.progress.phase]} after step {run.progress.step}")
