"""Encoding of candidates in worker processes, in chunks that can be resumed.

A chunk of candidates is encoded into a `.bin` file of clips and a `.json` list that names this file. A chunk is
complete when its list exists. No two processes write to the same file, so several machines that share the directory may
encode the same chunk at the same time.

Workers are separate processes because some media files crash the decoding libraries. If a worker crashes, each
candidate of its chunk is decoded in a process of its own, and the candidates that crash it are rejected.
"""

import contextlib
import json
import multiprocessing
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError
from distav.console import WorkCounter, show_progress
from distav.data.files import write_atomically
from distav.data.preparation.encoding import ClipSource, Encoding, RejectedClip
from distav.data.preparation.shared_work import Part, SharedWork, wait_for_others
from distav.data.preparation.source import Source
from distav.data.worker_processes import ctrl_c_blocked, ignore_ctrl_c, workers_terminated_by_ctrl_c


@dataclass(frozen=True)
class EncodedClip:
    """An encoded clip and the position of its bytes in a file of the work directory or in a shard.

    Attributes:
        file: name of the file.
        source, label, split: as in `ClipSource`.
        start_s: position in the source.
        width, height: stored size in pixels; 0 without video.
        members: offset, size in bytes and CRC-32 of each member that the clip has.
        repairs: what was done to a damaged or incomplete source.
    """

    file: str
    source: str
    label: str
    split: str
    start_s: float
    width: int
    height: int
    members: dict[str, tuple[int, int, int]]
    repairs: list[str] = field(default_factory=list[str])

    def read_member(self, name: str, folder: Path) -> bytes:
        """Return the content of a member.

        Raises:
            UserError: if its checksum differs.
        """
        offset, size, checksum = self.members[name]
        with open(folder / self.file, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if zlib.crc32(content) != checksum:
            raise UserError(
                f"{folder / self.file}: {name} of '{self.source}' is corrupt (CRC-32 differs); copy or create the file "
                "again."
            )
        return content


def encode_all(
    source: Source,
    encoding: Encoding,
    seed: int,
    chunks: list[list[ClipSource]],
    work_dir: Path,
    workers: int,
    part: Part | None = None,
) -> tuple[list[EncodedClip], list[dict[str, Any]], float]:
    """Encode the chunks that are not complete yet: all of them, or those of a part.

    Returns:
        The encoded clips and the rejected candidates, both in the order of the candidates, and the duration in
        seconds, 0 if nothing was left to encode.
    """
    start, part = time.monotonic(), part or Part()
    indices = part.indices(len(chunks))
    tasks = [_task(index) for index in range(len(chunks))]

    def is_encoded(task: str) -> bool:
        return _list_path(work_dir, task).exists()

    def count(selected: Iterable[int]) -> int:
        return sum(len(chunks[index]) for index in selected)

    done = count(index for index in indices if is_encoded(tasks[index]))
    with (
        part.work(work_dir, tasks, is_encoded) as work,
        show_progress(count(indices), "candidates", "encoding", done=done) as encoding_progress,
    ):
        anything_to_do = not work.finished()
        while not work.finished():
            crashed = _encode_in_pool(source, encoding, seed, chunks, work, work_dir, workers, encoding_progress)
            if crashed:
                _encode_without_crashing(source, encoding, seed, crashed[0], chunks[crashed[0]], work_dir)
            for index in crashed:
                work.release(_task(index))
            if not crashed and not work.finished():
                wait_for_others()
    encoded, rejected = read_lists(work_dir, indices)
    return encoded, rejected, time.monotonic() - start if anything_to_do else 0.0


def count_complete_chunks(work_dir: Path) -> int:
    """Return how many chunks of the dataset are complete."""
    return sum(1 for _ in work_dir.glob("chunk-*.json"))


def _encode_in_pool(
    source: Source,
    encoding: Encoding,
    seed: int,
    chunks: list[list[ClipSource]],
    work: SharedWork,
    work_dir: Path,
    workers: int,
    encoding_progress: WorkCounter,
) -> list[int]:
    """Encode chunks in a pool of processes until none can be claimed.

    Returns:
        The sorted indices of claimed chunks that a crash of a process has interrupted.
    """
    # A forked process would deadlock in the audio encoder.
    context = multiprocessing.get_context("spawn")
    running: dict[Future[None], int] = {}
    crashed: list[int] = []
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=ignore_ctrl_c)
    # The chunks of terminated workers are encoded again by the next command.
    with pool, workers_terminated_by_ctrl_c():
        while not crashed or running:
            while not crashed and len(running) < workers and (task := work.next()) is not None:
                index = _chunk_index(task)
                arguments = source, encoding, seed, index, chunks[index], work_dir
                try:
                    with ctrl_c_blocked():
                        running[pool.submit(_encode_chunk, *arguments)] = index
                except BrokenProcessPool:
                    crashed.append(index)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                try:
                    future.result()
                    work.release(_task(index))
                    encoding_progress.advance(len(chunks[index]))
                except BrokenProcessPool:
                    crashed.append(index)
    return sorted(crashed)


def read_lists(work_dir: Path, indices: Iterable[int]) -> tuple[list[EncodedClip], list[dict[str, Any]]]:
    """Return the encoded clips and the rejected candidates of complete chunks, in the order of the candidates."""
    encoded: list[EncodedClip] = []
    rejected: list[dict[str, Any]] = []
    for index in indices:
        content = json.loads(_list_path(work_dir, _task(index)).read_text())
        encoded += [EncodedClip(**clip) for clip in content["encoded"]]
        rejected += content["rejected"]
    return encoded, rejected


def _task(index: int) -> str:
    return f"chunk-{index:06d}"


def _chunk_index(task: str) -> int:
    return int(task.removeprefix("chunk-"))


def _list_path(work_dir: Path, task: str) -> Path:
    return work_dir / f"{task}.json"


def _encode_chunk(
    source: Source,
    encoding: Encoding,
    seed: int,
    index: int,
    candidates: list[ClipSource],
    work_dir: Path,
    crashing: frozenset[int] = frozenset(),
) -> None:
    """Encode one chunk; reject the candidates at the positions in `crashing` without decoding them."""
    file_name = f"{_task(index)}-{uuid.uuid4().hex[:12]}.bin"
    encoded: list[EncodedClip] = []
    rejected: list[dict[str, Any]] = []
    with _deleted_on_error(work_dir / file_name), open(work_dir / file_name, "xb") as file:
        for position, candidate in enumerate(candidates):
            first_clip = len(encoded)
            try:
                if position in crashing:
                    raise RejectedClip("not decodable: the decoder crashed")
                for clip in source.clips(candidate, encoding, _candidate_rng(seed, index, position)):
                    members = {}
                    for name, content in clip.members(encoding).items():
                        members[name] = file.tell(), len(content), zlib.crc32(content)
                        file.write(content)
                    height, width = clip.size
                    encoded.append(
                        EncodedClip(
                            file=file_name,
                            source=candidate.source,
                            label=candidate.label,
                            split=candidate.split,
                            start_s=clip.start_s,
                            width=width,
                            height=height,
                            members=members,
                            repairs=list(clip.repairs),
                        )
                    )
            except RejectedClip as reason:
                del encoded[first_clip:]
                rejected.append(
                    {
                        "path": candidate.source,
                        "start_s": candidate.start_s,
                        "end_s": candidate.end_s,
                        "label": candidate.label,
                        "reason": str(reason),
                    }
                )
        file.flush()
        os.fsync(file.fileno())
    content = {"encoded": [asdict(clip) for clip in encoded], "rejected": rejected}
    write_atomically(_list_path(work_dir, _task(index)), json.dumps(content).encode())


@contextlib.contextmanager
def _deleted_on_error(path: Path) -> Iterator[None]:
    """Delete an incomplete file if the enclosed code fails, so that it does not occupy a full disk."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _candidate_rng(seed: int, index: int, position: int) -> np.random.Generator:
    return np.random.default_rng([seed, 2, index, position])


def _encode_without_crashing(
    source: Source, encoding: Encoding, seed: int, index: int, candidates: list[ClipSource], work_dir: Path
) -> None:
    """Find the candidates of a chunk that crash their process, and encode the chunk without them.

    Raises:
        UserError: if even a process that decodes nothing crashes.
    """
    context = multiprocessing.get_context("spawn")
    idle = context.Process(target=int)
    idle.start()
    idle.join()
    if idle.exitcode:
        raise UserError(
            "the encoding processes cannot start; call this function from a file, under `if __name__ == '__main__'`."
        )
    crashing = set()
    for position, candidate in enumerate(candidates):
        rng = _candidate_rng(seed, index, position)
        process = context.Process(target=_decode_candidate, args=(source, encoding, candidate, rng))
        process.start()
        process.join()
        if process.exitcode != 0:
            crashing.add(position)
    _encode_chunk(source, encoding, seed, index, candidates, work_dir, frozenset(crashing))


def _decode_candidate(source: Source, encoding: Encoding, candidate: ClipSource, rng: np.random.Generator) -> None:
    with contextlib.suppress(RejectedClip):
        for _ in source.clips(candidate, encoding, rng):
            pass
