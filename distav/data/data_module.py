"""The set that a run trains and tests on, checked against the settings."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distav.config.errors import UserError, format_list
from distav.config.phases import ContrastivePhase, EventParsingPhase, LabelCorrectionPhase
from distav.config.schema import Config
from distav.data.annotations.events import EventLabels, load_events, read_events, num_segments
from distav.data.annotations.labels import Labels, load_labels
from distav.data.annotations.teacher_scores import check_scores, read_teacher_probs
from distav.data.dataset import ShardedDataset, Split


@dataclass
class DataModule:
    """Both splits, and what is told of them: each kind of label is read when it is first asked for."""

    shards: ShardedDataset
    train: Split
    test: Split | None
    override: str = ""

    @cached_property
    def labels(self) -> Labels:
        """One class of every training clip."""
        return load_labels(self.shards, self.train, self.override)

    @cached_property
    def test_labels(self) -> Labels | None:
        """One class of every test clip."""
        return load_labels(self.shards, self.test) if self.test else None

    @cached_property
    def events(self) -> EventLabels:
        """Classes and events of the training clips."""
        return load_events(self.shards, self.train, self.override)

    @cached_property
    def test_events(self) -> EventLabels | None:
        """Classes and events of the test clips."""
        return load_events(self.shards, self.test) if self.test else None

    def pseudo_label_events(self, name: str, phase: EventParsingPhase) -> tuple[np.ndarray, ...] | None:
        """Return the events that a phase learns from, [N, 2, T, C] bool, and which clips were looked at, [N] bool.

        None where it has weak labels alone.

        Raises:
            UserError: for a table that is missing or does not fit the set.
        """
        if not phase.pseudo_labels:
            return None
        path = Path(phase.pseudo_labels).expanduser()
        path = path / "events.parquet" if path.is_dir() else path
        return read_events(path, f"phases.{name}.harvested", self.train, self.shards.classes, self.events.weak)

    def teacher_probs(self, name: str, phase: LabelCorrectionPhase) -> np.ndarray | None:
        """Return what teachers hold each clip for, [N, 2, C] float32; None where none were asked.

        Raises:
            UserError: for scores that are missing or of another set.
        """
        if not phase.pseudo_labels:
            return None
        folder = Path(phase.pseudo_labels).expanduser()
        return read_teacher_probs(folder, f"phases.{name}.harvested", self.shards, self.train)

    @classmethod
    def open(cls, settings: Config) -> "DataModule":
        """Open the set and check the settings against it.

        Raises:
            UserError: for anything missing, or settings that this set makes impossible.
        """
        shards = ShardedDataset.open(settings.data.root, settings.data.cache, settings.data.cache_mib)
        train = shards.split(settings.data.train_split, "data.train_split")
        test = shards.split(settings.data.test_split, "data.test_split") if settings.data.test_split else None
        data = cls(shards, train, test, settings.data.label_overrides)
        parses = [isinstance(phase, EventParsingPhase) for phase in settings.phases.values()]
        if not all(parses):
            _ = data.labels, data.test_labels
        if any(parses):
            _ = data.events, data.test_events
            _check_segments(settings, train)
        if settings.optim.global_batch > len(train):
            raise UserError(
                f"optim.global_batch={settings.optim.global_batch}: the training split has {len(train)} samples; "
                "allowed: up to that many."
            )
        for name, phase in settings.phases.items():
            if isinstance(phase, EventParsingPhase):
                data.pseudo_label_events(name, phase)
            if isinstance(phase, LabelCorrectionPhase):
                if phase.pseudo_labels:
                    check_scores(Path(phase.pseudo_labels).expanduser(), f"phases.{name}.harvested", shards, train)
                k = min(phase.num_neighbors)
                if k >= len(train):
                    raise UserError(
                        f"phases.{name}.neighbors={phase.num_neighbors}: all are too many for a training split of "
                        f"{len(train)} samples; allowed: up to {len(train) - 1}, sensible: up to twice the "
                        f"{len(train) // len(shards.classes)} of a class."
                    )
            if train.streams and not isinstance(phase, EventParsingPhase):
                raise UserError(f"phases.{name}.kind={phase.kind}: {shards.location} holds features; allowed: parsing.")
            if shards.multi_label and not isinstance(phase, EventParsingPhase | ContrastivePhase):
                raise UserError(
                    f"phases.{name}.kind={phase.kind}: in {shards.location} a clip may have several classes; allowed: "
                    "parsing, contrastive."
                )
        return data


def _check_segments(settings: Config, train: Split) -> None:
    """Make sure that what the towers are fed of a clip covers its seconds evenly."""
    segments, data = num_segments(train), settings.data
    if train.streams:
        unknown = set(settings.model.parser.token_grids) - set(train.streams)
        if unknown:
            raise UserError(
                f"model.parser.token_grids.{min(unknown)}: the set has no such stream; allowed: {format_list(train.streams)}. "
                f"Leave it out by ~model.parser.token_grids.{min(unknown)}."
            )
        for name, (rows, columns) in settings.model.parser.token_grids.items():
            if rows * columns != train.streams[name].steps:
                raise UserError(
                    f"model.parser.token_grids.{name}=[{rows}, {columns}]: the stream has {train.streams[name].steps} steps."
                )
        return
    if data.audio_s != segments:
        raise UserError(f"data.audio_s={data.audio_s:g}: parsing hears all of a clip; set it to {segments}.")
    if data.num_frames % segments or data.num_frames * data.frame_stride != round(segments * train.fps):
        raise UserError(
            f"data.num_frames={data.num_frames} and data.frame_stride={data.frame_stride}: parsing sees every second "
            f"of a clip alike; take a multiple of {segments} frames whose strides make up the "
            f"{round(segments * train.fps)} stored ones."
        )
