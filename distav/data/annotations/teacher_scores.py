"""What teachers said of every second, kept as it came: scores in files of some samples each, beside what was asked.

Legend: N samples, T segments, C classes.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.annotations.events import num_segments
from distav.data.dataset import ShardedDataset, Split
from distav.data.modalities import MODALITIES

CHUNK = 256
"""Samples whose scores are one file."""


def metadata_file(folder: Path) -> Path:
    """Return the file that says of which set and captions the scores are."""
    return folder / "scores" / "about.json"


def score_file(folder: Path, split: str, chunk: int) -> Path:
    """Return the file of some samples' scores."""
    return folder / "scores" / f"{split}-{chunk:06d}.npz"


def score_files(folder: Path, split: Split) -> list[Path]:
    """Return the files of a whole split's scores, by chunk."""
    return [score_file(folder, split.name, chunk) for chunk in range(-(-len(split) // CHUNK))]


def write_scores(path: Path, audio: np.ndarray, visual: np.ndarray) -> None:
    """Write scores, [n, T, C] float32 each, so that the file is either whole or not there."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, audio=audio, visual=visual)
    os.replace(part, path)


def manifest_digest(shards: ShardedDataset) -> str:
    """Return a digest of the manifest, by which scores know their set."""
    return hashlib.sha256(json.dumps(shards.manifest, sort_keys=True).encode()).hexdigest()


def check_scores(folder: Path, key: str, shards: ShardedDataset, split: Split) -> list[int]:
    """Make sure that a folder holds all scores of a split; returns the place of each of the set's classes in them.

    Args:
        folder: what tools/pseudo_label.py wrote.
        key: the setting that names it.
        shards: the set.
        split: whose scores are wanted.

    Raises:
        UserError: where a file is missing, or scores are of another set or classes.
    """
    try:
        about = json.loads(metadata_file(folder).read_bytes())
        asked, digest = about["asked"]["audio"][1], about["set"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{key}={folder}: holds no scores; give a folder that tools/pseudo_label.py wrote.") from None
    if digest != manifest_digest(shards):
        raise UserError(f"{key}={folder}: holds scores of another set than {shards.location}; harvest this one.")
    missing = [name for name in shards.classes if name not in asked]
    if missing:
        raise UserError(f"{key}={folder}: its teachers were not asked for {format_list(missing)}.")
    gone = [path for path in score_files(folder, split) if not path.exists()]
    if gone:
        raise UserError(f"{key}={folder}: {gone[0].name} is missing; run tools/pseudo_label.py again, and it goes on.")
    return [asked.index(name) for name in shards.classes]


def read_scores(folder: Path, key: str, shards: ShardedDataset, split: Split) -> np.ndarray:
    """Return the scores of a split, [N, 2, T, C] float32, by the classes of the set; NaN where a clip was unreadable.

    See `check_scores` for the arguments.

    Raises:
        UserError: where a file is missing or is not what was written, or scores are of another set or classes.
    """
    return np.concatenate(list(_chunks(folder, key, shards, split)))


def read_teacher_probs(folder: Path, key: str, shards: ShardedDataset, split: Split) -> np.ndarray:
    """Return what teachers hold every clip for, [N, 2, C] float32: `clip_shares` of what `read_scores` reads."""
    return np.concatenate([clip_probs(scores) for scores in _chunks(folder, key, shards, split)])


def _chunks(folder: Path, key: str, shards: ShardedDataset, split: Split) -> Iterator[np.ndarray]:
    places = check_scores(folder, key, shards, split)
    for chunk, path in enumerate(score_files(folder, split)):
        rows = min(CHUNK, len(split) - chunk * CHUNK)
        try:
            with np.load(path, allow_pickle=False) as file:
                both = np.stack([file[modality] for modality in MODALITIES], axis=1)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and run tools/pseudo_label.py again."
            ) from None
        expected = (rows, len(MODALITIES), num_segments(split))
        if both.shape[:3] != expected or both.ndim != 4 or both.shape[3] <= max(places) or both.dtype != np.float32:
            raise UserError(
                f"{path} holds {both.dtype} of shape {both.shape}, expected float32 of {expected} and classes."
            )
        yield both[..., places]


def clip_probs(scores: np.ndarray) -> np.ndarray:
    """Return what teachers hold a whole clip for: softmax over classes of the mean score, [N, 2, T, C] -> [N, 2, C].

    Scores are logits, as the teachers were trained with them. A clip without scores is held for anything.
    """
    logits = np.nan_to_num(scores).mean(axis=2)
    shares = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (shares / shares.sum(axis=2, keepdims=True)).astype(np.float32)
