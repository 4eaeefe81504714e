"""AV-Digits: handwritten digits (MNIST) that move, with spoken digits (FSDD) as their sound."""

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
from scipy.ndimage import shift
from scipy.signal import resample_poly

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import Clip, ClipSource, Encoding

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_INDEX_BELOW = 5
IMAGES_PER_TEST_RECORDING = 10
_RECORDING = re.compile(r"(\d)_(\w+)_(\d+)\.wav$")


@dataclass(frozen=True)
class DigitsSource:
    """`digits`: every recording with an image of its digit that no other clip shows.

    Recordings with index 0-4 are the official test set of FSDD; each is shown with ten images, since pictures are
    plentiful. With a speaker held out, only that speaker is tested on, and is not heard in training.
    """

    images: Path
    image_labels: Path
    recordings: Path
    degrade: bool = False
    hold_out_speaker: str = ""
    seed: int = 0

    def candidates(self) -> list[ClipSource]:
        """Pair every recording with images of its digit.

        Raises:
            UserError: for files that are not MNIST idx files or spoken-digit recordings, or too few images.
        """
        labels = _read_idx(self.image_labels, 1)
        if len(_read_idx(self.images, 3)) != len(labels):
            raise UserError(f"--images {self.images} and --image-labels {self.image_labels} differ in length.")
        rng = np.random.default_rng([self.seed, 1])
        unused = {digit: rng.permutation(np.flatnonzero(labels == digit)).tolist() for digit in range(10)}
        matches = [match for name in sorted(_read_recordings(self.recordings)) if (match := _RECORDING.search(name))]
        speakers = sorted({match[2] for match in matches})
        if self.hold_out_speaker and self.hold_out_speaker not in speakers:
            raise UserError(f"--hold-out-speaker={self.hold_out_speaker}: allowed: {format_list(speakers)}.")
        found = []
        for match in matches:
            digit, held_out = int(match[1]), match[2] == self.hold_out_speaker
            test = int(match[3]) < TEST_INDEX_BELOW
            if self.hold_out_speaker and test != held_out:
                continue
            for _ in range(IMAGES_PER_TEST_RECORDING if test else 1):
                if not unused[digit]:
                    raise UserError(f"--images {self.images}: too few images of digit {digit} for the recordings.")
                image = unused[digit].pop()
                split = "test" if test else "train"
                found.append(ClipSource(match[0], NAMES[digit], split, detail=(match[0], image)))
        if not found:
            raise UserError(f"--recordings {self.recordings}: no files named DIGIT_SPEAKER_INDEX.wav.")
        return found

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Render one clip: the digit drifts over a dark ground while it is spoken."""
        name, image = candidate.detail
        digit = _read_idx(self.images, 3)[int(image)].astype(np.float32) / 255
        frames = _drift(digit, encoding, rng)
        sound = _place(self.recordings, str(name), encoding, rng)
        if self.degrade:
            frames, sound = _degrade(frames, sound, rng)
        pixels = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
        yield Clip(np.repeat(pixels[..., None], 3, axis=3), sound)


def _drift(digit: np.ndarray, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    side = encoding.side
    if side < digit.shape[0]:
        raise UserError(f"--short-side={side}: the digits are {digit.shape[0]} pixels high; give that or more.")
    room = side - digit.shape[0]
    start, end = rng.uniform(0, room, 2), rng.uniform(0, room, 2)
    ground = np.zeros((side, side), np.float32)
    ground[: digit.shape[0], : digit.shape[1]] = digit
    moments = np.linspace(0, 1, encoding.num_frames)
    return np.stack([shift(ground, start + (end - start) * moment, order=1) for moment in moments])


def _place(recordings: Path, name: str, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    sound, rate = soundfile.read(io.BytesIO(_read_recordings(recordings)[name]), dtype="float32", always_2d=True)
    sound = sound.mean(axis=1)
    if rate != encoding.sample_rate_hz:
        sound = resample_poly(sound, encoding.sample_rate_hz, rate).astype(np.float32)
    slack = encoding.num_audio_samples - len(sound)
    if slack < 0:
        return sound[: encoding.num_audio_samples]
    before = int(rng.integers(0, slack + 1))
    return np.pad(sound, (before, slack - before))


def _degrade(frames: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make a clip hard: occluding patch, contrast 0.4-1, pixel noise 0.3, sound at -5 to 10 dB SNR."""
    side = frames.shape[1]
    patch = rng.integers(side // 5, side // 3 + 1, 2)
    top, left = (int(rng.integers(0, side - length + 1)) for length in patch)
    frames = frames * rng.uniform(0.4, 1.0)
    frames[:, top : top + patch[0], left : left + patch[1]] = rng.uniform(0, 1)
    frames = frames + rng.normal(0, 0.3, frames.shape)
    snr_db = rng.uniform(-5, 10)
    spoken = sound[np.abs(sound) > 1e-4]
    power = float(np.mean(spoken**2)) if len(spoken) else 1e-4
    sound = sound + rng.normal(0, np.sqrt(power / 10 ** (snr_db / 10)), sound.shape)
    return frames, (sound / max(1.0, float(np.abs(sound).max()))).astype(np.float32)


@lru_cache(maxsize=4)
def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Read an idx file, plain or gzipped."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    shape = np.frombuffer(raw, ">u4", num_dims, 4) if len(raw) >= 4 + 4 * num_dims else np.zeros(0, np.uint32)
    if raw[:4] != bytes([0, 0, 8, num_dims]) or len(raw) != 4 + 4 * num_dims + int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path}: not an idx file of {num_dims}-dimensional unsigned bytes, or not all of it.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims).reshape(shape.astype(int))


@lru_cache(maxsize=2)
def _read_recordings(path: Path) -> dict[str, bytes]:
    """Return the WAV files of a folder or of a tar archive by name."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.glob("*.wav"))}
    if not path.is_file():
        raise UserError(f"--recordings {path}: no such folder or tar archive.")
    try:
        with tarfile.open(path) as tar:
            files = [each for each in tar if each.isfile() and each.name.endswith(".wav")]
            return {Path(each.name).name: content.read() for each in files if (content := tar.extractfile(each))}
    except tarfile.TarError as error:
        raise UserError(f"--recordings {path}: no readable tar archive: {error}") from None
