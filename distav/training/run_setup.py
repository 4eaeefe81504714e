"""Opening a run: data, model, memory bank, checkpoints and log."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from distav.config.phases import ContrastivePhase, EventParsingPhase
from distav.config.schema import Config
from distav.data.annotations.events import num_segments
from distav.data.data_module import DataModule
from distav.data.dataset import Split
from distav.data.modalities import MODALITIES
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import micro_batch_size
from distav.distributed.collectives import run_on_main_rank
from distav.distributed.process_group import World
from distav.distributed.rendezvous import set_record_dir
from distav.distributed.signals import handle_signals
from distav.memory.bank import Bank
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser
from distav.models.tower_inputs import describe_towers, with_tower_inputs
from distav.training.checkpoint.manager import CheckpointManager
from distav.training.checkpoint.mirror import CHECKPOINTS, RunMirror
from distav.training.engine.deepspeed_engine import Engine, trains_in_bf16
from distav.training.initial_weights import InitialWeights
from distav.training.metric_logger import MetricLogger
from distav.training.run import Run
from distav.training.run_dir import lock_run_dir
from distav.training.run_state import Progress, RunState
from distav.training.validation import validate_labels


@contextmanager
def open_run(config: Config, world: World) -> Iterator[Run]:
    """Open a run: a new one, or one restored from its last checkpoint.

    Raises:
        UserError: if config and data are inconsistent, or the run directory belongs to another run.
    """
    data = DataModule.open(config)
    validate_labels(config, data)
    if not data.train.streams:
        model = describe_towers(config.model)
        config = replace(config, model=model, data=with_tower_inputs(config.data, model, data.train.fps))
    folder = Path(config.run.root) / config.run.name
    keep = config.run.keep_checkpoints
    mirror = RunMirror(config.run.mirror, folder, keep) if config.run.mirror else None
    with ExitStack() as stack:
        stack.enter_context(lock_run_dir(folder, config, world, mirror))
        set_record_dir(folder / "logs" / "collectives")
        logger = MetricLogger(folder, world)
        stack.callback(logger.close)
        initial_weights = InitialWeights(config.model, logger)
        stack.callback(Engine.release_groups)
        engine = Engine(lambda: _build_model(config, data), config, world, initial_weights)
        bank = _build_bank(config, world, data.train, len(data.shards.classes))
        checkpoints = CheckpointManager(folder / CHECKPOINTS, keep, mirror)
        progress, state = checkpoints.restore(engine, bank, logger.warn) or _initialize(
            engine, config, initial_weights.has_sources
        )
        logger.resume_at(progress.total_steps, state.metrics_bytes)
        run_on_main_rank(lambda: logger.open_trackers(config), "choose another run.root")
        micro_batch = micro_batch_size(
            config.optim.global_batch, config.optim.gradient_accumulation_steps, world.world_size
        )
        loader = Loader(data.train, config.data, config.augment, config.run.seed, micro_batch, world.device)
        stack.callback(loader.close)
        loader.quarantine.reasons |= state.quarantined
        shutdown = stack.enter_context(handle_signals())
        run = Run(config, world, folder, data, logger, engine, bank, loader, checkpoints, shutdown, progress, state)
        _log_startup(run)
        yield run
        run.finish_saving()
        run.finish_uploading()


def _build_model(config: Config, data: DataModule) -> AVModel | FeatureParser:
    num_classes, segments = len(data.shards.classes), num_segments(data.train)
    if data.train.streams:
        return FeatureParser(config.model.parser, data.train.streams, segments, num_classes)
    parses_events = any(isinstance(phase, EventParsingPhase) for phase in config.phases.values())
    rate = data.train.sample_rate_hz
    return AVModel(config.model, config.data, rate, num_classes, segments if parses_events else 0)


def _initialize(engine: Engine, config: Config, is_pretrained: bool) -> tuple[Progress, RunState]:
    """Return progress and state of a new run, and load the initial weights if there are others than random ones."""
    if is_pretrained:
        engine.reinitialize(config.run.seed)
    return Progress(), RunState()


def _build_bank(config: Config, world: World, train: Split, num_classes: int) -> Bank:
    num_bytes = 2 * len(train) * config.model.embed_dim * 4
    contrastive = [phase for phase in config.phases.values() if isinstance(phase, ContrastivePhase)]
    uses_category_memory = any(phase.category_memory_weight for phase in contrastive)
    return Bank(
        len(train),
        config.model.embed_dim,
        config.memory_bank.momentum,
        world.device,
        config.run.seed,
        num_categories=(config.model.num_categories or num_classes) if uses_category_memory else 0,
        replicated=num_bytes <= config.memory_bank.replicate_below_mib * 2**20,
        present={name: torch.from_numpy(train.has_modality(name)) for name in MODALITIES},
        dtype=torch.bfloat16 if world.device.type == "cuda" and trains_in_bf16(config, world) else torch.float32,
    )


def _log_startup(run: Run) -> None:
    data, config = run.data, run.config
    run.logger.info(
        f"{run.folder}: {len(data.train)} training clips, {len(data.shards.classes)} classes, "
        f"{run.engine.num_parameters / 1e6:.1f}M parameters, {run.world.world_size} rank(s) on "
        f"{run.world.device.type}, ZeRO stage {run.engine.stage}, phases: {', '.join(config.phases)}"
    )
    if run.checkpoints.mirror and run.checkpoints.downloaded:
        run.logger.info(f"restored {run.checkpoints.downloaded} and the results from {run.checkpoints.mirror.location}")
    if run.progress.phase == len(config.phases):
        run.logger.info("all phases are finished; writing the report")
    elif run.progress.total_steps or run.progress.phase:
        phase = list(config.phases)[run.progress.phase]
        run.logger.info(f"resuming in phase {phase} after step {run.progress.step}")
