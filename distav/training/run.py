"""What a phase works on: the settings, the data, the engine, the bank, and where the run stands."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distav.config.errors import UserError, listed
from distav.config.phases import ContrastivePhase, ParsingPhase
from distav.config.schema import Settings
from distav.data.annotations.events import segments_of
from distav.data.data_module import Data
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import TrainingOrder, check_batch
from distav.distributed.collectives import any_rank, gather_objects
from distav.distributed.process_group import World
from distav.distributed.rendezvous import keep_records
from distav.distributed.signals import Interrupted, Stop, listening
from distav.memory.bank import Bank
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser
from distav.models.pretrained import weights
from distav.training.checkpoint.manager import Checkpoints, Position
from distav.training.engine.deepspeed_engine import Engine, trains_in_bf16
from distav.training.metric_logger import Monitor
from distav.training.run_dir import claimed


@dataclass
class Run:
    """A run in progress."""

    settings: Settings
    world: World
    folder: Path
    data: Data
    monitor: Monitor
    engine: Engine
    bank: Bank
    loader: Loader
    checkpoints: Checkpoints
    stop: Stop
    position: Position
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON values that are saved with the run, such as the figures for the report."""
    _phase_began: float = field(default_factory=time.monotonic)

    @property
    def micro_batch(self) -> int:
        """Samples of this rank in a micro-batch."""
        optim = self.settings.optim
        return check_batch(optim.global_batch, optim.accumulation, self.world.num_ranks)

    def order(self, phase: int) -> TrainingOrder:
        """Return the order of samples of a phase."""
        settings, sizes = self.settings, self.data.train.shard_sizes
        seed = settings.run.seed * 1000 + phase
        return TrainingOrder(
            sizes, seed, settings.data.shuffle_block, settings.optim.global_batch, settings.optim.accumulation
        )

    def begin_phase(self, afresh: bool = False) -> None:
        """Start the clock of a phase: where a killed run left it, or afresh after another phase."""
        before = self.notes.pop("seconds_in_phase", 0.0)
        self._phase_began = time.monotonic() - (0.0 if afresh else before)

    def seconds_in_phase(self) -> float:
        """Return the seconds spent in this phase, those before a kill included up to the last checkpoint."""
        return time.monotonic() - self._phase_began

    def save(self) -> None:
        """Take a checkpoint; it is written while the run goes on. One that could not be written is told and missed."""
        began = time.monotonic()
        self.notes["seconds_in_phase"] = self.seconds_in_phase()
        self.notes["bad_samples"] = list(self.bad_samples().items())
        faults = self.checkpoints.save(self.position, self.engine, self.bank, self.notes)
        if faults and self.world.is_main:
            self.monitor.warn(f"a checkpoint could not be written, the run goes on without it: {'; '.join(faults)}")
        waited = time.monotonic() - began
        saving = self.notes.setdefault("saving", {"checkpoints": 0, "seconds": 0.0})
        saving["checkpoints"] += 1
        saving["seconds"] = round(saving["seconds"] + waited, 3)
        times = {"time/checkpoint_s": waited, "time/checkpoint_write_s": self.checkpoints.write_s}
        self.monitor.record(self.position.total_steps, times)

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
        found = self.checkpoints.restore(self.engine, self.bank, self.monitor.warn, self.position.phase)
        if found:
            self.position, self.notes = found
            self.begin_phase()
        return found is not None

    def restart(self) -> None:
        """Begin a phase with new weights and rows of the bank; of earlier phases the labels and pairs found stay."""
        self.engine.restart(self.settings.run.seed * 1000 + self.position.phase)
        self.bank.restart()
        for name in ("nce_partition", "given_labels_learnt"):
            self.notes.pop(name, None)

    def end_if_asked(self) -> None:
        """Save and end the run on all ranks where any was asked to.

        Raises:
            Interrupted: when the checkpoint is on disk.
        """
        if any_rank(self.stop.asked):
            self.save()
            self.finish_saving()
            raise Interrupted(f"asked to end; saved after step {self.position.total_steps}")

    def bad_samples(self) -> dict[int, str]:
        """Return every training sample that any rank could not use, and why."""
        reasons: dict[int, str] = {}
        for part in gather_objects(dict(self.loader.quarantine.reasons)):
            reasons |= part
        return dict(sorted(reasons.items()))

    def check_budget(self) -> dict[int, str]:
        """Stop the run where too many samples are bad; returns them.

        Raises:
            UserError: naming the first of them and the reasons.
        """
        bad, most = self.bad_samples(), self.settings.data.max_bad_fraction
        self.loader.quarantine.reasons.update(bad)
        if len(bad) > most * len(self.data.train):
            first = "; ".join(f"{self.data.train.keys[sample]}: {reason}" for sample, reason in list(bad.items())[:3])
            raise UserError(
                f"{len(bad)} of {len(self.data.train)} training samples cannot be used, more than "
                f"data.max_bad_fraction={most:g}: {first}. Mend the shards or allow a larger share."
            )
        return bad


@contextmanager
def opened(settings: Settings, world: World) -> Iterator[Run]:
    """Open a run, new or where it was left.

    Raises:
        UserError: for settings or data that do not go together, or a folder that holds another run.
    """
    data = Data.open(settings)
    folder = Path(settings.run.root) / settings.run.name
    with ExitStack() as stack:
        stack.enter_context(claimed(folder, settings, world))
        keep_records(folder / "logs" / "collectives")
        monitor = Monitor(folder, world)
        stack.callback(monitor.close)
        engine = Engine(lambda: _model(settings, data), settings, world)
        bank = _bank(settings, world, len(data.train), len(data.shards.classes))
        checkpoints = Checkpoints(folder / "checkpoints", settings.run.keep_checkpoints)
        position, notes = checkpoints.restore(engine, bank, monitor.warn) or _start(engine, settings, monitor)
        micro = check_batch(settings.optim.global_batch, settings.optim.accumulation, world.num_ranks)
        loader = Loader(data.train, settings.data, settings.augment, settings.run.seed, micro, world.device)
        stack.callback(loader.close)
        loader.quarantine.reasons |= {int(sample): reason for sample, reason in notes.get("bad_samples", [])}
        stop = stack.enter_context(listening())
        run = Run(settings, world, folder, data, monitor, engine, bank, loader, checkpoints, stop, position, notes)
        _greet(run)
        yield run
        run.finish_saving()


def _model(settings: Settings, data: Data) -> AVModel | FeatureParser:
    num_classes, segments = len(data.shards.classes), segments_of(data.train)
    if data.train.streams:
        return FeatureParser(settings.model.parser, data.train.streams, segments, num_classes)
    parses = any(isinstance(phase, ParsingPhase) for phase in settings.phases.values())
    rate = data.train.sample_rate_hz
    return AVModel(settings.model, settings.data, rate, num_classes, segments if parses else 0)


def _start(engine: Engine, settings: Settings, monitor: Monitor) -> tuple[Position, dict[str, Any]]:
    """Begin a run, with the weights of an earlier one where they are asked for."""
    source = settings.model.start_from
    if source:
        try:
            offered = weights(Path(source).expanduser())
        except UserError as error:
            raise UserError(f"model.start_from={source}: {error}") from None
        taken = engine.restart(settings.run.seed, offered)
        if not taken:
            raise UserError(
                f"model.start_from={source}: none of its weights fits this network; take its `model` settings."
            )
        left = sorted({name.split(".")[0] for name in set(offered) - set(taken)})
        monitor.say(f"starts from {source}" + (f", all but {listed(left)}" if left else ""))
    return Position(), {}


def _bank(settings: Settings, world: World, num_samples: int, num_classes: int) -> Bank:
    size = 2 * num_samples * settings.model.embed_dim * 4
    contrastive = [phase for phase in settings.phases.values() if isinstance(phase, ContrastivePhase)]
    remembers = any(phase.category_memory for phase in contrastive)
    return Bank(
        num_samples,
        settings.model.embed_dim,
        settings.bank.momentum,
        world.device,
        settings.run.seed,
        num_categories=(settings.model.num_categories or num_classes) if remembers else 0,
        replicated=size <= settings.bank.replicate_below_mib * 2**20,
        dtype=torch.bfloat16 if world.device.type == "cuda" and trains_in_bf16(settings, world) else torch.float32,
    )


def _greet(run: Run) -> None:
    data, settings = run.data, run.settings
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in run.engine.model.parameters())
    run.monitor.say(
        f"{run.folder}: {len(data.train)} training clips in {len(data.shards.classes)} classes, "
        f"{parameters / 1e6:.1f}M parameters, {run.world.num_ranks} rank(s) on {run.world.device.type}, "
        f"ZeRO {run.engine.stage}, phases: {', '.join(settings.phases)}"
    )
    if run.position.total_steps or run.position.phase:
        names = [*settings.phases, "the end"]
        run.monitor.say(f"going on in {names[run.position.phase]} after step {run.position.step}")
