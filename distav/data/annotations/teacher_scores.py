"""Scores of teachers for every second and class, in files of `CHUNK` samples, and the probabilities computed from them.

Legend: N samples, T segments of one second, C classes.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.annotations.events import num_segments
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import write_atomically
from distav.data.modalities import MODALITIES

CHUNK = 256
"""Samples per score file."""


def metadata_file(folder: Path) -> Path:
    """Return the path of the file that records the dataset and the teachers of the scores in a directory."""
    return folder / "scores" / "about.json"


def score_metadata(
    shards: ShardedDataset, teachers: Mapping[str, tuple[str, Sequence[str], Sequence[str]]]
) -> dict[str, Any]:
    """Return the content of `metadata_file`, JSON values.

    Args:
        shards: the dataset.
        teachers: checkpoint, classes and captions of the teacher of each modality.
    """
    return {
        "dataset": manifest_digest(shards),
        "teachers": {
            modality: {"checkpoint": checkpoint, "classes": list(classes), "captions": list(captions)}
            for modality, (checkpoint, classes, captions) in teachers.items()
        },
    }


def score_file(folder: Path, split: str, chunk: int) -> Path:
    """Return the path of the scores of one chunk."""
    return folder / "scores" / f"{split}-{chunk:06d}.npz"


def score_files(folder: Path, split: Split) -> list[Path]:
    """Return the paths of all score files of a split, by chunk."""
    return [score_file(folder, split.name, chunk) for chunk in range(-(-len(split) // CHUNK))]


def write_scores(path: Path, audio: np.ndarray, visual: np.ndarray) -> None:
    """Write the scores of one chunk, [n, T, C] float32 per modality, so that the file is never incomplete."""
    content = io.BytesIO()
    np.savez(content, audio=audio, visual=visual)
    write_atomically(path, content.getvalue())


def manifest_digest(shards: ShardedDataset) -> str:
    """Return the SHA-256 of a dataset's manifest, which identifies the dataset."""
    return hashlib.sha256(json.dumps(shards.manifest, sort_keys=True).encode()).hexdigest()


def check_scores(folder: Path, key: str, shards: ShardedDataset, split: Split) -> list[int]:
    """Verify that a directory contains all scores of a split.

    Args:
        folder: directory written by tools/pseudo_label.py.
        key: setting that names it, for error messages.
        shards: the dataset.
        split: its split.

    Returns:
        For each class of the dataset, its index in the scores.

    Raises:
        UserError: if a file is missing, or if the scores belong to another dataset or to other classes.
    """
    try:
        metadata = json.loads(metadata_file(folder).read_bytes())
        scored_classes, dataset = metadata["teachers"]["audio"]["classes"], metadata["dataset"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(
            f"{key}={folder}: contains no scores; give a directory that tools/pseudo_label.py wrote."
        ) from None
    if dataset != manifest_digest(shards):
        raise UserError(
            f"{key}={folder}: contains scores of a dataset other than {shards.location}; run tools/pseudo_label.py on "
            "this one."
        )
    missing = [name for name in shards.classes if name not in scored_classes]
    if missing:
        raise UserError(
            f"{key}={folder}: contains no scores for {format_list(missing)}; add prompts for these classes and run "
            "tools/pseudo_label.py again."
        )
    absent = [path for path in score_files(folder, split) if not path.exists()]
    if absent:
        raise UserError(
            f"{key}={folder}: {absent[0].name} is missing; run tools/pseudo_label.py again to complete the scores."
        )
    return [scored_classes.index(name) for name in shards.classes]


def read_scores(folder: Path, key: str, shards: ShardedDataset, split: Split) -> np.ndarray:
    """Return the scores of a split, [N, 2, T, C] float32, with the classes of the dataset.

    They are NaN for clips that could not be read, and in the modality that a clip lacks.

    See `check_scores` for the arguments.

    Raises:
        UserError: if a file is missing or invalid, or if the scores belong to another dataset or to other classes.
    """
    return np.concatenate(list(_chunks(folder, key, shards, split)))


def read_teacher_probs(folder: Path, key: str, shards: ShardedDataset, split: Split) -> np.ndarray:
    """Return the class probabilities of the teachers, [N, 2, C] float32: `clip_probs` of the scores of a split.

    See `read_scores` for arguments and errors.
    """
    return np.concatenate([clip_probs(scores) for scores in _chunks(folder, key, shards, split)])


def _chunks(folder: Path, key: str, shards: ShardedDataset, split: Split) -> Iterator[np.ndarray]:
    """Yield the scores of each chunk, [n, 2, T, C] float32."""
    indices = check_scores(folder, key, shards, split)
    for chunk, path in enumerate(score_files(folder, split)):
        rows = min(CHUNK, len(split) - chunk * CHUNK)
        try:
            with np.load(path, allow_pickle=False) as file:
                scores = np.stack([file[modality] for modality in MODALITIES], axis=1)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and run tools/pseudo_label.py again."
            ) from None
        expected = (rows, len(MODALITIES), num_segments(split))
        if (
            scores.shape[:3] != expected
            or scores.ndim != 4
            or scores.shape[3] <= max(indices)
            or scores.dtype != np.float32
        ):
            raise UserError(
                f"{path} contains {scores.dtype} of shape {scores.shape}, expected float32 of shape "
                f"{(*expected, 'classes')}; delete it and run tools/pseudo_label.py again."
            )
        yield scores[..., indices]


def clip_probs(scores: np.ndarray) -> np.ndarray:
    """Return class probabilities of clips: softmax over classes of the mean score, [N, 2, T, C] -> [N, 2, C] float32.

    Scores are logits of the teachers. Without scores (NaN) in a modality, because the clip could not be read or lacks
    the modality, all classes have equal probabilities: the teacher has no preference.
    """
    logits = np.nan_to_num(scores).mean(axis=2)
    probs = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (probs / probs.sum(axis=2, keepdims=True)).astype(np.float32)
