"""Chunked work that several ranks share and that can be resumed: each chunk is one output file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from distav.distributed.collectives import broadcast
from distav.distributed.process_group import World


def missing_chunks(paths: Sequence[Path]) -> list[int]:
    """Return the indices of the output files that do not exist; the first rank decides for all ranks."""
    return broadcast([index for index, path in enumerate(paths) if not path.exists()])


def iter_rank_chunks(chunks: Sequence[int], world: World, description: str) -> Iterator[int]:
    """Yield every `world_size`-th chunk to each rank, with a progress bar on the first rank."""
    with tqdm(total=len(chunks), unit="chunk", desc=description, disable=not world.is_main, mininterval=1) as bar:
        for position, chunk in enumerate(chunks):
            if position % world.world_size == world.rank:
                yield chunk
            bar.update()
