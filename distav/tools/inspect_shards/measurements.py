"""Measurements of decoded clips and features, in several processes.

Legend: T frames, H W pixels, N audio samples.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.features import decode_features
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, ShardReader
from distav.data.worker_processes import ctrl_c_blocked, ignore_ctrl_c
from distav.tools.inspect_shards.loudness import loudness_lufs

SILENT_DBFS = -60.0
"""A clip is silent if its peak is below this level."""
LOWEST_DBFS = -120.0
"""Peak level of digital silence."""
BLACK_PIXEL, BLACK_FRACTION = 0.1, 0.98
"""A clip is black if this fraction of the pixels of every frame is darker than BLACK_PIXEL (FFmpeg's blackdetect)."""
STILL_LEVELS, STILL_BLOCK = 2.0, 8
"""A clip is still if the mean of every block of STILL_BLOCK x STILL_BLOCK pixels stays within STILL_LEVELS of the first
frame's."""
_BATCH = 32
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

_reader: ShardReader


def measure(root: str | Path, split: Split, ids: np.ndarray, workers: int) -> list[dict[str, Any]]:
    """Read, verify, decode and measure some samples of a split.

    Args:
        root: the dataset.
        split: a split of the dataset.
        ids: ids of the samples.
        workers: number of processes; few samples are decoded in this process.

    Returns:
        For each sample its id and either `damaged` (the reason by member), `undecodable` (the reason), or the result of
        `measure_clip` or `measure_features`. Clips without a modality lack its measurements.

    Raises:
        UserError: if a process dies.
    """
    batches = [ids[start : start + _BATCH].tolist() for start in range(0, len(ids), _BATCH)]
    workers = min(workers, len(batches))
    with tqdm(total=len(ids), unit="clip", desc=f"decoding {split.name}", mininterval=1, disable=None) as bar:
        rows: list[dict[str, Any]] = []
        measured = (
            _measure_in_processes(root, split, batches, workers) if workers > 1 else _measure_serially(split, batches)
        )
        for batch_rows in measured:
            rows += batch_rows
            bar.update(len(batch_rows))
    return rows


def _measure_serially(split: Split, batches: list[list[int]]) -> Iterator[list[dict[str, Any]]]:
    reader = ShardReader(split)
    try:
        yield from map(partial(_measure_samples, reader), batches)
    finally:
        reader.close()


def _measure_in_processes(
    root: str | Path, split: Split, batches: list[list[int]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    # Media libraries can deadlock after a fork, so workers are spawned.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_open_reader, initargs=(root, split.name)) as pool:
        try:
            with ctrl_c_blocked():
                measured = pool.map(_measure_batch, batches)
            yield from measured
        except BrokenProcessPool:
            raise UserError(
                f"{root}: a worker process died while decoding {split.name}, because of a clip or of insufficient "
                "memory; use fewer --workers, or --workers=1 to decode in this process and find the clip."
            ) from None


def _open_reader(root: str | Path, split: str) -> None:
    ignore_ctrl_c()
    import torch

    global _reader
    torch.set_num_threads(1)
    _reader = ShardReader(ShardedDataset.open(root).split(split))


def _measure_batch(ids: list[int]) -> list[dict[str, Any]]:
    return _measure_samples(_reader, ids)


def _measure_samples(reader: ShardReader, ids: list[int]) -> list[dict[str, Any]]:
    return [{"id": sample, **_measure_sample(reader, sample)} for sample in ids]


def _measure_sample(reader: ShardReader, sample: int) -> dict[str, Any]:
    split = reader.split
    members: dict[str, bytes] = {}
    damaged: dict[str, str] = {}
    for name in split.members:
        try:
            members[name] = reader.member(sample, name)
        except CorruptSampleError as reason:
            damaged[name] = str(reason)
    members = {name: content for name, content in members.items() if content}
    if damaged:
        return {"damaged": damaged}
    try:
        if split.streams:
            features = {name: decode_features(members[name], stream) for name, stream in split.streams.items()}
            return measure_features(features)
        return measure_clip(*decode_clip(members), split.sample_rate_hz)
    except DecodeError as reason:
        return {"undecodable": str(reason)}


def measure_features(streams: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the root mean square of each stream's features [steps, dim], and whether one of them is constant."""
    rms = {name: float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) for name, values in streams.items()}
    return {"rms": rms, "blank": any(values.min() == values.max() for values in streams.values())}


def measure_clip(frames: np.ndarray | None, audio: np.ndarray | None, sample_rate_hz: int) -> dict[str, Any]:
    """Measure a decoded clip.

    Args:
        frames: [T, H, W, 3] uint8; None without video.
        audio: [N] float32 in [-1, 1]; None without audio.
        sample_rate_hz: sample rate of the audio.

    Returns:
        With audio: `peak_dbfs`; `loudness_lufs`, None if the audio is too short or too quiet; `silent`. With video:
        `black`, `still`.
    """
    measured: dict[str, Any] = {}
    if audio is not None:
        peak = peak_dbfs(audio)
        measured |= {
            "peak_dbfs": peak,
            "loudness_lufs": loudness_lufs(audio, sample_rate_hz),
            "silent": peak < SILENT_DBFS,
        }
    if frames is not None:
        luma = frames @ _LUMA
        measured |= {
            "black": bool(((luma < 255 * BLACK_PIXEL).mean(axis=(1, 2)) >= BLACK_FRACTION).all()),
            "still": _is_still(luma),
        }
    return measured


def peak_dbfs(audio: np.ndarray) -> float:
    """Return the peak level of audio [N] in dB relative to full scale."""
    peak = float(np.abs(audio).max(initial=0.0))
    return 20 * float(np.log10(max(peak, 10 ** (LOWEST_DBFS / 20))))


def _is_still(luma: np.ndarray) -> bool:
    """Return whether luma [T, H, W] has no motion; block means are insensitive to codec noise."""
    if len(luma) < 2:
        return False
    rows, columns = np.arange(0, luma.shape[1], STILL_BLOCK), np.arange(0, luma.shape[2], STILL_BLOCK)
    sums = np.add.reduceat(np.add.reduceat(luma, rows, axis=1), columns, axis=2)
    areas = np.outer(np.diff(rows, append=luma.shape[1]), np.diff(columns, append=luma.shape[2]))
    return bool((np.abs(sums - sums[0]) <= STILL_LEVELS * areas).all())
