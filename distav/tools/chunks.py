"""Chunked work that several ranks share and that can be resumed: each chunk is one output file."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distav.console import WorkCounter, show_progress
from distav.distributed.collectives import broadcast
from distav.distributed.process_group import World


def missing_chunks(paths: Sequence[Path]) -> list[int]:
    """Return the indices of the output files that do not exist; the first rank decides for all ranks."""
    return broadcast([index for index, path in enumerate(paths) if not path.exists()])


@dataclass(frozen=True)
class Chunk:
    """Some of the clips of a split or group.

    Attributes:
        index: number of the chunk.
        ids: [n] ids of its clips.
    """

    index: int
    ids: np.ndarray


def rank_chunks(indices: Sequence[int], chunk_size: int, num_clips: int, world: World) -> list[Chunk]:
    """Return the chunks of a rank: every `world_size`-th one.

    Args:
        indices: numbers of the chunks of all ranks.
        chunk_size: clips per chunk; the last one may have fewer.
        num_clips: number of all clips.
        world: the rank.
    """
    return [
        Chunk(index, np.arange(index * chunk_size, min((index + 1) * chunk_size, num_clips)))
        for index in indices[world.rank :: world.world_size]
    ]


def chunk_progress(chunks: Sequence[Chunk], description: str, world: World) -> AbstractContextManager[WorkCounter]:
    """Return a context that shows progress over the clips of the chunks of the first rank."""
    ranks = f" (rank 0 of {world.world_size})" if world.world_size > 1 else ""
    return show_progress(sum(len(chunk.ids) for chunk in chunks), "clips", description + ranks)
