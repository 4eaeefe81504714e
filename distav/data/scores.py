"""What teachers said of every second, kept as it came: scores in files of some samples each, beside what was asked.

Legend: N samples, T segments, C classes.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from distav.data.events import segments_of
from distav.data.format import SENSES, ShardSet, Split
from distav.errors import UserError, listed

CHUNK = 256
"""Samples whose scores are one file."""


def about_file(folder: Path) -> Path:
    """Return the file that says of which set and captions the scores are."""
    return folder / "scores" / "about.json"


def score_file(folder: Path, split: str, chunk: int) -> Path:
    """Return the file of some samples' scores."""
    return folder / "scores" / f"{split}-{chunk:06d}.npz"


def write_scores(path: Path, audio: np.ndarray, visual: np.ndarray) -> None:
    """Write scores, [n, T, C] float32 each, so that the file is either whole or not there."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(file, audio=audio, visual=visual)
    os.replace(part, path)


def digest_of(shards: ShardSet) -> str:
    """Return a digest of the manifest, by which scores know their set."""
    return hashlib.sha256(json.dumps(shards.manifest, sort_keys=True).encode()).hexdigest()


def read_scores(folder: Path, key: str, shards: ShardSet, split: Split) -> np.ndarray:
    """Return the scores of a split, [N, 2, T, C] float32, by the classes of the set; NaN where a clip was unreadable.

    Args:
        folder: what tools/harvest_labels.py wrote.
        key: the setting that names it.
        shards: the set.
        split: whose scores are read.

    Raises:
        UserError: where a file is missing or is not what was written, or scores are of another set or classes.
    """
    classes = shards.classes
    try:
        about = json.loads(about_file(folder).read_bytes())
        asked, digest = about["asked"]["audio"][1], about["set"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{key}={folder}: holds no scores; give a folder that tools/harvest_labels.py wrote.") from None
    if digest != digest_of(shards):
        raise UserError(f"{key}={folder}: holds scores of another set than {shards.root}; harvest this one.")
    missing = [name for name in classes if name not in asked]
    if missing:
        raise UserError(f"{key}={folder}: its teachers were not asked for {listed(missing)}.")
    parts = []
    for chunk in range(-(-len(split) // CHUNK)):
        path, rows = score_file(folder, split.name, chunk), min(CHUNK, len(split) - chunk * CHUNK)
        expected = (rows, len(SENSES), segments_of(split), len(asked))
        try:
            with np.load(path, allow_pickle=False) as file:
                both = np.stack([file[sense] for sense in SENSES], axis=1)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and run tools/harvest_labels.py again."
            ) from None
        if both.shape != expected or both.dtype != np.float32:
            raise UserError(f"{path} holds {both.dtype} of shape {both.shape}, expected float32 of {expected}.")
        parts.append(both)
    return np.concatenate(parts)[..., [asked.index(name) for name in classes]]


def clip_shares(scores: np.ndarray) -> np.ndarray:
    """Return what teachers hold a whole clip for: softmax over classes of the mean score, [N, 2, T, C] -> [N, 2, C].

    Scores are logits, as the teachers were trained with them. A clip without scores is held for anything.
    """
    logits = np.nan_to_num(scores).mean(axis=2)
    shares = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (shares / shares.sum(axis=2, keepdims=True)).astype(np.float32)
