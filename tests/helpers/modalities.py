"""A dataset of files with video and audio, with video alone, and with audio alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.data.dataset import ShardedDataset
from distav.evaluation.embedding import Embeddings
from distav.tools.audit.issues import Issues, neighbors_of
from distav.tools.audit.page import Audit
from distav.tools.make_shards import main
from tests.helpers.media import write_audio, write_media, write_silent

MODALITIES = {
    "both-0.mp4": {"video", "audio"},
    "both-1.mkv": {"video", "audio"},
    "both-2.mkv": {"video", "audio"},
    "silent-0.mkv": {"video"},
    "silent-1.avi": {"video"},
    "audio-0.wav": {"audio"},
    "cover.mp3": {"audio"},
}
"""Members of the clips of each file."""
OPTIONS = ("--clip-s=1", "--fps=8", "--sample-rate=8000", "--test-fraction=0", "--workers=1")


def write_mixed_folder(folder: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write files of two seconds with all combinations of modalities for each class, and files without media."""
    for index, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for name, members in MODALITIES.items():
            path = folder / label / name
            if members == {"audio"}:
                write_audio(path, 2.0, cover=name.startswith("cover"))
            else:
                write_media_file = write_media if "audio" in members else write_silent
                write_media_file(path, 2.0, size=(64 + 16 * index, 48))
        (folder / label / "notes.txt").write_text("text\n" * 100)
        (folder / label / "cover.bin").write_bytes(bytes(range(256)) * 20)
    return folder


def mixed_shards(folder: Path, out: Path, *options: str, status: int = 3) -> Path:
    """Build a dataset of the files of `write_mixed_folder`, in which clips may lack a modality."""
    assert main(["videos", str(folder), str(out), *OPTIONS, "--modalities=any", *options]) == status
    return out


def members_of(source: str) -> set[str]:
    """Return the members of the clips of a file of `write_mixed_folder`."""
    return MODALITIES[Path(source).name]


def audit_of(mixed: Path) -> Audit:
    """Return the page of a dataset with a label issue for every clip, and with random embeddings."""
    shards = ShardedDataset.open(mixed)
    split = shards.split("train")
    has = {name: split.has_modality(name) for name in ("visual", "audio")}
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((len(split), 4)).astype(np.float32) * has[name][:, None] for name in has}
    embeddings = Embeddings(
        **rows,
        visual_embedding=rows["visual"],
        audio_embedding=rows["audio"],
        **dict.fromkeys(("logits", "visual_logits", "audio_logits"), np.zeros((len(split), 2), np.float32)),
        has_visual=has["visual"],
        has_audio=has["audio"],
    )
    ids = np.arange(len(split))
    labels = [shards.classes[index % 2] for index in range(len(split))]
    table = pa.table({"key": split.keys.tolist(), **dict.fromkeys(("given_label", "knn_label"), labels)})
    table = table.append_column("corrected_label", [labels])
    issues = [Issues("label", ids, np.linspace(1, 0.5, len(ids)), len(ids)), Issues("pair", ids[:0], ids[:0] / 1, 0)]
    neighbors = [neighbors_of(embeddings, split, ranked.ids, 3) for ranked in issues]
    correction = {"label_noise_rate_by_class": {}, "label_noise_rate": None, "pair_mismatch_rate": None}
    return Audit("mixed", split, shards.classes, table, correction, issues, neighbors, {})
