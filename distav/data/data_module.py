"""The training and test split of a run with their labels, validated against the configuration."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distav.config.errors import UserError, format_list
from distav.config.phases import (
    ContrastivePhase,
    EventParsingPhase,
    LabelCorrectionPhase,
    PhaseConfig,
    SupervisedPhase,
    Targets,
)
from distav.config.schema import Config
from distav.data.annotations.events import EventLabels, load_events, num_segments, read_events
from distav.data.annotations.labels import Labels, load_labels
from distav.data.annotations.multi_labels import MultiLabels, load_multi_labels
from distav.data.annotations.teacher_scores import check_scores, read_teacher_probs
from distav.data.dataset import MEMBERS, ShardedDataset, Split
from distav.distributed.collectives import get_rank, get_world_size

log = logging.getLogger("distav")


@dataclass
class DataModule:
    """Both splits of a run and their labels; each label table is read when it is first accessed.

    Attributes:
        shards: the dataset.
        train: training split.
        test: test split; None: no evaluation.
        override: table that replaces given training labels, `data.label_overrides`; empty: none.
    """

    shards: ShardedDataset
    train: Split
    test: Split | None
    override: str = ""

    @cached_property
    def labels(self) -> Labels:
        """Labels of the training clips, one class each; in a multi-label dataset, one combination of classes each."""
        return load_labels(self.shards, self.train, "" if self.shards.multi_label else self.override)

    @cached_property
    def test_labels(self) -> Labels | None:
        """Labels of the test clips, likewise."""
        return load_labels(self.shards, self.test) if self.test else None

    @cached_property
    def multi_labels(self) -> MultiLabels:
        """Label lists of the training clips of a multi-label dataset."""
        return load_multi_labels(self.shards, self.train, self.override)

    @cached_property
    def test_multi_labels(self) -> MultiLabels | None:
        """Label lists of the test clips of a multi-label dataset."""
        return load_multi_labels(self.shards, self.test) if self.test else None

    @cached_property
    def events(self) -> EventLabels:
        """Weak labels and events of the training clips."""
        return load_events(self.shards, self.train, self.override)

    @cached_property
    def test_events(self) -> EventLabels | None:
        """Weak labels and events of the test clips."""
        return load_events(self.shards, self.test) if self.test else None

    def pseudo_label_events(self, name: str, phase: EventParsingPhase) -> tuple[np.ndarray, ...] | None:
        """Return the pseudo-labels of an event-parsing phase.

        Args:
            name: name of the phase.
            phase: its configuration.

        Returns:
            Events [N, 2, T, C] bool, and the annotated clips [N] bool; None if the phase uses weak labels only.

        Raises:
            UserError: if the table is missing or does not match the dataset.
        """
        if not phase.pseudo_labels:
            return None
        path = Path(phase.pseudo_labels).expanduser()
        path = path / "events.parquet" if path.is_dir() else path
        return read_events(path, f"phases.{name}.pseudo_labels", self.train, self.shards.classes, self.events.weak)

    def teacher_probs(self, name: str, phase: LabelCorrectionPhase) -> np.ndarray | None:
        """Return the class probabilities of the teachers, [N, 2, C] float32; None if the phase uses no teachers.

        Args:
            name: name of the phase.
            phase: its configuration.

        Raises:
            UserError: if scores are missing or belong to another dataset.
        """
        if not phase.pseudo_labels:
            return None
        folder = Path(phase.pseudo_labels).expanduser()
        return read_teacher_probs(folder, f"phases.{name}.pseudo_labels", self.shards, self.train)

    @classmethod
    def open(cls, config: Config) -> "DataModule":
        """Open the dataset, read all labels that the phases use, and validate the configuration against both.

        Raises:
            UserError: if anything is missing or invalid, or if a setting is impossible with this dataset.
        """
        shards = ShardedDataset.open(config.data.root, config.data.cache, config.data.cache_mib)
        train = shards.split(config.data.train_split, "data.train_split")
        test = shards.split(config.data.test_split, "data.test_split") if config.data.test_split else None
        data = cls(shards, train, test, config.data.label_overrides)
        data._read_labels(config)
        data._validate(config)
        if get_rank() == 0:
            _warn_of_small_cache(config, train)
        return data

    def _read_labels(self, config: Config) -> None:
        """Read every label table that a phase uses, so that an invalid table ends the run before it trains."""
        uses_events = [isinstance(phase, EventParsingPhase) for phase in config.phases.values()]
        if not all(uses_events):
            _ = self.labels, self.test_labels
            if self.shards.multi_label:
                _ = self.multi_labels, self.test_multi_labels
        if any(uses_events):
            _ = self.events, self.test_events

    def _validate(self, config: Config) -> None:
        """Raise a UserError for settings that are impossible with this dataset."""
        if any(isinstance(phase, EventParsingPhase) for phase in config.phases.values()):
            _check_segments(config, self.train)
            self._check_modalities()
        if config.optim.global_batch > len(self.train):
            step = get_world_size() * config.optim.gradient_accumulation_steps
            largest = max(1, len(self.train) // step) * step
            raise UserError(
                f"optim.global_batch={config.optim.global_batch}: the training split has {len(self.train)} samples; "
                f"allowed: multiples of {step} up to that number, e.g. optim.global_batch={largest}."
            )
        for name, phase in config.phases.items():
            if isinstance(phase, EventParsingPhase):
                self.pseudo_label_events(name, phase)
                continue
            if self.shards.multi_label:
                self._check_multi_label(name, phase)
            if isinstance(phase, LabelCorrectionPhase):
                self._check_correction(name, phase)
            if isinstance(phase, ContrastivePhase):
                self._check_contrastive(name, phase)
            if self.train.streams:
                raise UserError(
                    f"phases.{name}.kind={phase.kind}: {self.shards.location} holds features; allowed: parsing."
                )

    def _check_multi_label(self, name: str, phase: PhaseConfig) -> None:
        """Verify that a phase supports several classes per clip; its loss is checked when the run is opened."""
        several = f"clips of {self.shards.location} may have several classes"
        if not isinstance(phase, ContrastivePhase | LabelCorrectionPhase | SupervisedPhase):
            raise UserError(
                f"phases.{name}.kind={phase.kind}: {several}; allowed: contrastive, label_correction, supervised, "
                "parsing."
            )
        if isinstance(phase, LabelCorrectionPhase) and phase.pseudo_labels:
            raise UserError(f"phases.{name}.pseudo_labels={phase.pseudo_labels}: {several}; leave it empty.")
        if isinstance(phase, SupervisedPhase) and phase.targets is Targets.hybrid:
            raise UserError(f"phases.{name}.targets=hybrid: {several}; allowed: given, posterior, held_out, oracle.")

    def _check_modalities(self) -> None:
        """Verify that all clips have both modalities, as event parsing needs."""
        for modality, member in MEMBERS.items():
            for split in [self.train] + ([self.test] if self.test else []):
                if missing := int((~split.has_modality(modality)).sum()):
                    raise UserError(
                        f"{missing} of {len(split)} clips of split {split.name} of {self.shards.location} have no "
                        f"{member}; event parsing needs both. Make the dataset again without --modalities any."
                    )

    def _check_contrastive(self, name: str, phase: ContrastivePhase) -> None:
        """Verify that a contrastive phase has pairs, or a loss within a modality."""
        has_pairs = (self.train.has_modality("visual") & self.train.has_modality("audio")).any()
        if not has_pairs and not phase.within_modal_weight:
            raise UserError(
                f"phases.{name}.within_modal_weight=0: no clip of split {self.train.name} of {self.shards.location} "
                f"has both video and audio, so only the within-modal loss can be trained; set phases.{name}."
                "within_modal_weight=1."
            )

    def _check_correction(self, name: str, phase: LabelCorrectionPhase) -> None:
        """Verify teacher scores and number of neighbors of a label-correction phase."""
        if phase.pseudo_labels:
            folder = Path(phase.pseudo_labels).expanduser()
            check_scores(folder, f"phases.{name}.pseudo_labels", self.shards, self.train)
        num_samples = len(self.train)
        if min(phase.num_neighbors) >= num_samples:
            per_class = num_samples // len(self.shards.classes)
            raise UserError(
                f"phases.{name}.num_neighbors={phase.num_neighbors}: every value is too large for a training split of "
                f"{num_samples} samples; allowed: at most {num_samples - 1}, recommended: at most twice the "
                f"{per_class} samples of a class, e.g. phases.{name}.num_neighbors=[{max(1, per_class)}]."
            )


def _warn_of_small_cache(config: Config, train: Split) -> None:
    """Log if the cache of a remote dataset has no room for a shuffle block and the next one."""
    data = config.data
    if not train.remote or not data.cache_mib:
        return
    sizes = sorted(train.shard_bytes, reverse=True)
    needed_mib = -(-min(2 * sum(sizes[: data.shuffle_block_shards]), sum(sizes)) >> 20)
    if data.cache_mib < needed_mib:
        shards = max(1, (data.cache_mib << 20) // (2 * sizes[0]))
        log.warning(
            "data.cache_mib=%d: two blocks of data.shuffle_block_shards=%d shards have %d MiB. Samples for which there "
            "is no room are read with one request each; set data.cache_mib=%d, or data.shuffle_block_shards=%d.",
            data.cache_mib,
            data.shuffle_block_shards,
            needed_mib,
            needed_mib,
            shards,
        )


def _check_segments(config: Config, train: Split) -> None:
    """Verify that the input of the towers covers every second of a clip equally."""
    if train.streams:
        _check_token_grids(config, train)
        return
    segments, data = num_segments(train), config.data
    if data.audio_s != segments:
        raise UserError(
            f"data.audio_s={data.audio_s:g}: event parsing needs the audio of the complete clip; set it to {segments}."
        )
    stored_frames = round(segments * train.fps)
    if data.num_frames % segments or data.num_frames * data.frame_stride != stored_frames:
        raise UserError(
            f"data.num_frames={data.num_frames} and data.frame_stride={data.frame_stride}: event parsing needs the "
            f"same number of frames from every second of a clip; allowed: num_frames a multiple of {segments}, and "
            f"num_frames * frame_stride equal to the {stored_frames} stored frames."
        )


def _check_token_grids(config: Config, train: Split) -> None:
    grids = config.model.parser.token_grids
    unknown = set(grids) - set(train.streams)
    if unknown:
        key = f"model.parser.token_grids.{min(unknown)}"
        raise UserError(
            f"{key}: the dataset has no such feature stream; allowed: {format_list(train.streams)}. Remove it with "
            f"~{key}."
        )
    for name, (rows, columns) in grids.items():
        if rows * columns != train.streams[name].steps:
            raise UserError(
                f"model.parser.token_grids.{name}=[{rows}, {columns}]: the stream has {train.streams[name].steps} "
                "steps; allowed: rows and columns whose product is that number."
            )
