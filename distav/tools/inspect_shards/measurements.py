"""How clips look and sound, in figures; decoded in several processes where there are many.

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

SILENT_DBFS = -60.0
"""A clip is silent whose peak is below."""
LOWEST_DBFS = -120.0
"""The peak of nothing at all."""
BLACK_PIXEL, BLACK_SHARE = 0.1, 0.98
"""A clip is black if in every frame this share of the pixels has less than this brightness (FFmpeg's blackdetect)."""
STILL_LEVELS, STILL_BLOCK = 2.0, 8
"""A clip is still if no block of so many pixels a side ever differs in its mean by more from the first frame's."""
SHORTEST_LOUD_S = 0.4
"""One block of ITU-R BS.1770; the loudness of a shorter sound is not defined."""
_BATCH = 32
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

_reader: ShardReader


def measure(root: str | Path, split: Split, ids: np.ndarray, workers: int) -> list[dict[str, Any]]:
    """Read, check and decode some samples of a split.

    Args:
        root: the set.
        split: its split.
        ids: of the samples.
        workers: processes; a few samples take one alone, this one.

    Returns:
        For each sample its id and either `damaged` (the reason by member), `undecodable` (the reason), or what
        `measure_clip` or `measure_features` says of it.

    Raises:
        UserError: where a process died.
    """
    batches = [ids[start : start + _BATCH].tolist() for start in range(0, len(ids), _BATCH)]
    workers = min(workers, len(batches))
    with tqdm(total=len(ids), unit="clip", desc=f"decoding {split.name}", mininterval=1, disable=None) as bar:
        found: list[dict[str, Any]] = []
        for rows in _in_processes(root, split, batches, workers) if workers > 1 else _here(split, batches):
            found += rows
            bar.update(len(rows))
    return found


def _here(split: Split, batches: list[list[int]]) -> Iterator[list[dict[str, Any]]]:
    reader = ShardReader(split)
    try:
        yield from map(partial(_measure_samples, reader), batches)
    finally:
        reader.close()


def _in_processes(
    root: str | Path, split: Split, batches: list[list[int]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    # Forked media libraries hang, so workers start afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(root, split.name)) as pool:
        try:
            yield from pool.map(_measure_opened, batches)
        except BrokenProcessPool:
            raise UserError(
                f"{root}: a process that decodes died, of a clip of {split.name} or for want of memory; "
                "give fewer --workers, and with --workers=1 the clip brings down this process instead."
            ) from None


def _open(root: str | Path, split: str) -> None:
    import torch

    global _reader
    torch.set_num_threads(1)
    _reader = ShardReader(ShardedDataset.open(root).split(split))


def _measure_opened(ids: list[int]) -> list[dict[str, Any]]:
    return _measure_samples(_reader, ids)


def _measure_samples(reader: ShardReader, ids: list[int]) -> list[dict[str, Any]]:
    return [{"id": sample, **_measure(reader, sample)} for sample in ids]


def _measure(reader: ShardReader, sample: int) -> dict[str, Any]:
    split = reader.split
    members: dict[str, bytes] = {}
    damaged: dict[str, str] = {}
    for name in split.members:
        try:
            members[name] = reader.member(sample, name)
        except CorruptSampleError as reason:
            damaged[name] = str(reason)
    if damaged:
        return {"damaged": damaged}
    try:
        if split.streams:
            return measure_features(
                {name: decode_features(members[name], each) for name, each in split.streams.items()}
            )
        return measure_clip(*decode_clip(members), split.sample_rate_hz)
    except DecodeError as reason:
        return {"undecodable": str(reason)}


def measure_features(streams: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the root mean square of each stream's features [steps, dim], and whether one has no two values."""
    rms = {name: float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) for name, values in streams.items()}
    return {"rms": rms, "blank": any(values.min() == values.max() for values in streams.values())}


def measure_clip(frames: np.ndarray, sound: np.ndarray, sample_rate_hz: int) -> dict[str, Any]:
    """Measure a decoded clip.

    Args:
        frames: [T, H, W, 3] uint8.
        sound: [N] float32 in [-1, 1].
        sample_rate_hz: of the sound.

    Returns:
        `peak_dbfs`; `loudness_lufs`, None where the sound is too short or too quiet for it; `silent`, `black`, `still`.
    """
    luma = frames @ _LUMA
    peak = peak_dbfs(sound)
    return {
        "peak_dbfs": peak,
        "loudness_lufs": loudness_lufs(sound, sample_rate_hz),
        "silent": peak < SILENT_DBFS,
        "black": bool(((luma < 255 * BLACK_PIXEL).mean(axis=(1, 2)) >= BLACK_SHARE).all()),
        "still": _is_still(luma),
    }


def peak_dbfs(sound: np.ndarray) -> float:
    """Return the peak of a sound [N] in dB below full scale."""
    peak = float(np.abs(sound).max(initial=0.0))
    return 20 * float(np.log10(max(peak, 10 ** (LOWEST_DBFS / 20))))


def loudness_lufs(sound: np.ndarray, sample_rate_hz: int) -> float | None:
    """Return the loudness of a mono sound [N] by ITU-R BS.1770, None below 0.4 s or its gate of -70 LUFS."""
    if len(sound) < round(SHORTEST_LOUD_S * sample_rate_hz):
        return None
    import torch
    import torchaudio.functional

    found = float(torchaudio.functional.loudness(torch.from_numpy(sound)[None], sample_rate_hz))
    return found if np.isfinite(found) else None


def _is_still(luma: np.ndarray) -> bool:
    """Whether nothing moves in luma [T, H, W]; block means tell motion from the noise of a codec."""
    if len(luma) < 2:
        return False
    rows, columns = (np.arange(0, side, STILL_BLOCK) for side in luma.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(luma, rows, axis=1), columns, axis=2)
    areas = np.outer(np.diff(rows, append=luma.shape[1]), np.diff(columns, append=luma.shape[2]))
    return bool((np.abs(sums - sums[0]) <= STILL_LEVELS * areas).all())
