"""Encoding in worker processes: a chunk of candidates in, one file of encoded clips and one list out.

A chunk is finished when its list is there. The list names the file, and no two processes write to the same file, so
that a chunk may be encoded twice at once, on whatever machines share the folder.

Workers are separate processes, since media libraries meet files that bring them down; a chunk whose worker died is
taken again one candidate at a time, each in a process of its own, and what kills that is rejected by name.
"""

import contextlib
import json
import multiprocessing
import os
import re
import time
import uuid
import zlib
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.data.preparation.encoding import ClipSource, Encoding, RejectedClip
from distav.data.preparation.sources import Source


@dataclass(frozen=True)
class ChunkSubset:
    """Every N-th chunk, from the I-th on: what one machine of several encodes."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "ChunkSubset":
        """Read `I/N`.

        Raises:
            UserError: for anything else, or an I that is not from 0 to N-1.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError(f"--part={text}: write I/N, with I from 0 to N-1, such as 0/4 for the first part of four.")
        return cls(int(match[1]), int(match[2]))

    def numbers(self, chunks: int) -> range:
        """Return the numbers of its chunks."""
        return range(self.number, chunks, self.of)


@dataclass(frozen=True)
class EncodedClip:
    """An encoded clip and where its bytes lie: in a file of the work folder, or in a tar of a set."""

    file: str
    source: str
    label: str
    split: str
    start_s: float
    width: int
    height: int
    members: dict[str, tuple[int, int, int]]
    """Offset, bytes and CRC-32 by name."""

    def member(self, name: str, folder: Path) -> bytes:
        """Return the content of a member.

        Raises:
            UserError: where it is not what was written.
        """
        offset, size, checksum = self.members[name]
        with open(folder / self.file, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if zlib.crc32(content) != checksum:
            raise UserError(f"{folder / self.file}: {name} of '{self.source}' was altered; copy or make it anew.")
        return content


def encode_all(
    source: Source,
    encoding: Encoding,
    seed: int,
    chunks: list[list[ClipSource]],
    work: Path,
    workers: int,
    part: ChunkSubset | None = None,
) -> tuple[list[EncodedClip], list[dict[str, Any]], float]:
    """Encode every chunk, or those of a part, that are not finished yet.

    Returns:
        The encoded clips and the rejected candidates, both in the order of the candidates, and the seconds it took,
        0 if nothing was left to do.
    """
    began = time.monotonic()
    numbers = (part or ChunkSubset()).numbers(len(chunks))
    todo = [number for number in numbers if not _list_of(work, number).exists()]
    anything = bool(todo)
    bar = tqdm(total=sum(len(chunks[number]) for number in numbers), unit="clip", desc="encoding", mininterval=1)
    bar.update(sum(len(chunks[number]) for number in set(numbers) - set(todo)))
    while todo:
        # Forked audio coders hang, so workers start afresh.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
            futures: dict[Future[None], int] = {
                pool.submit(_encode_chunk, source, encoding, seed, number, chunks[number], work): number
                for number in todo
            }
            broken = []
            for future in as_completed(futures):
                try:
                    future.result()
                    bar.update(len(chunks[futures[future]]))
                except BrokenProcessPool:
                    broken.append(futures[future])
        for number in [each for each in sorted(broken) if not _list_of(work, each).exists()][:1]:
            _encode_carefully(source, encoding, seed, number, chunks[number], work)
            bar.update(len(chunks[number]))
        todo = [number for number in broken if not _list_of(work, number).exists()]
    bar.close()
    lists = [json.loads(_list_of(work, number).read_text()) for number in numbers]
    encoded = [EncodedClip(**each) for done in lists for each in done["encoded"]]
    rejected = [each for done in lists for each in done["rejected"]]
    return encoded, rejected, time.monotonic() - began if anything else 0.0


def finished(work: Path) -> int:
    """Return how many chunks are encoded."""
    return sum(1 for _ in work.glob("chunk-*.json"))


def _list_of(work: Path, number: int) -> Path:
    return work / f"chunk-{number:06d}.json"


def _encode_chunk(
    source: Source,
    encoding: Encoding,
    seed: int,
    number: int,
    candidates: list[ClipSource],
    work: Path,
    deadly: frozenset[int] = frozenset(),
) -> None:
    """Encode one chunk, leaving out the places in it that brought a worker down."""
    file = f"chunk-{number:06d}-{uuid.uuid4().hex[:12]}.bin"
    encoded: list[EncodedClip] = []
    rejected: list[dict[str, Any]] = []
    with open(work / file, "xb") as sink:
        for place, candidate in enumerate(candidates):
            try:
                if place in deadly:
                    raise RejectedClip("not decodable: the decoder crashed on it")
                for clip in source.clips(candidate, encoding, _rng(seed, number, place)):
                    members = {}
                    for name, content in clip.members(encoding).items():
                        members[name] = sink.tell(), len(content), zlib.crc32(content)
                        sink.write(content)
                    height, width = clip.size
                    encoded.append(
                        EncodedClip(
                            file=file,
                            source=candidate.source,
                            label=candidate.label,
                            split=candidate.split,
                            start_s=clip.start_s,
                            width=width,
                            height=height,
                            members=members,
                        )
                    )
            except RejectedClip as reason:
                facts = asdict(candidate)
                row = {name: facts[name] for name in ("start_s", "end_s", "label")}
                rejected.append({"path": candidate.source, **row, "reason": str(reason)})
        sink.flush()
        os.fsync(sink.fileno())
    done = {"encoded": [asdict(each) for each in encoded], "rejected": rejected}
    write_atomically(_list_of(work, number), json.dumps(done).encode())


def _rng(seed: int, number: int, place: int) -> np.random.Generator:
    return np.random.default_rng([seed, 2, number, place])


def _encode_carefully(
    source: Source, encoding: Encoding, seed: int, number: int, candidates: list[ClipSource], work: Path
) -> None:
    """Find the candidates that kill their process, and encode the chunk without them.

    Raises:
        UserError: where processes die that have nothing to do.
    """
    context = multiprocessing.get_context("spawn")
    idle = context.Process(target=int)
    idle.start()
    idle.join()
    if idle.exitcode:
        raise UserError(
            "processes that encode cannot be started here; call this from a file, under `if __name__ == '__main__'`."
        )
    deadly = set()
    for place, candidate in enumerate(candidates):
        trial = context.Process(target=_try, args=(source, encoding, candidate, _rng(seed, number, place)))
        trial.start()
        trial.join()
        if trial.exitcode != 0:
            deadly.add(place)
    _encode_chunk(source, encoding, seed, number, candidates, work, frozenset(deadly))


def _try(source: Source, encoding: Encoding, candidate: ClipSource, rng: np.random.Generator) -> None:
    """Decode one candidate to see whether the process lives through it."""
    with contextlib.suppress(RejectedClip):
        for _ in source.clips(candidate, encoding, rng):
            pass
