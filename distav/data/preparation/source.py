"""The interface between dataset sources and the builder."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from distav.data.modalities import FeatureStream
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, Features


class Source(Protocol):
    """A list of candidates and a method that returns the clips of each.

    Implement a source as a frozen dataclass of paths, numbers and strings. It is pickled for the worker processes. Its
    type and its fields are part of the recipe in the manifest: an unfinished build is only resumed with equal ones.
    """

    def candidates(self) -> list[ClipSource]:
        """Return all candidates, always in the same order."""
        ...

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip | Features]:
        """Yield the clips of one candidate.

        Args:
            candidate: one of `candidates`.
            encoding: rates, size, duration and modalities of the clips.
            rng: the only source of randomness; its seed depends on the position of the candidate.

        Raises:
            RejectedClip: if the candidate cannot be used.
        """
        ...


@dataclass(frozen=True)
class SourceInfo:
    """What a source provides in addition to one class per sample; by default nothing.

    Attributes:
        classes: class names in the order of their indices; None: the sorted labels of the candidates.
        multi_label: whether a sample may have several classes.
        events: [2, T, C] bool, audio and visual events by split, source and label of the candidate.
        streams: feature streams by name; empty if samples are clips.
    """

    classes: list[str] | None = None
    multi_label: bool = False
    events: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict[tuple[str, str, str], np.ndarray])
    streams: dict[str, FeatureStream] = field(default_factory=dict[str, FeatureStream])


@runtime_checkable
class AnnotatedSource(Source, Protocol):
    """A source with a list of classes, time-stamped events or features.

    Attributes:
        clip_seconds: duration that the annotations refer to; clips have to be of this duration. None: any duration.
    """

    clip_seconds: ClassVar[float | None]

    def info(self) -> SourceInfo:
        """Return classes, events and streams."""
        ...


@runtime_checkable
class DirectorySource(Source, Protocol):
    """A source that uses all files of a directory; the dataset has to be written to a directory outside of it."""

    @property
    def folder(self) -> Path:
        """The directory."""
        ...


@runtime_checkable
class FixedModalitiesSource(Source, Protocol):
    """A source that allows only some values of `--modalities`, such as one that renders both modalities."""

    @property
    def allowed_modalities(self) -> tuple[str, ...]:
        """Allowed values of `Encoding.modalities`."""
        ...


class CommandLineSource(Source, Protocol):
    """A source that is a command of make_shards.py; `distav.data.preparation.registry` lists them.

    Attributes:
        description: one sentence for `--help`.
        example: a command line for `--help`.
        default_encoding: defaults of the encoding options.
    """

    description: ClassVar[str]
    example: ClassVar[str]
    default_encoding: ClassVar[Encoding]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of this source to those that all sources have: OUT, encoding, noise, seed and workers."""
        ...

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options.

        Raises:
            UserError: for an option with an invalid value.
        """
        ...
