"""AV-Digits: moving handwritten digits (MNIST) with spoken digits (FSDD) as their audio."""

import argparse
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import soundfile

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_INDEX_BELOW = 5
IMAGES_PER_TEST_RECORDING = 10
_RECORDING = re.compile(r"(\d)_(\w+)_(\d+)\.wav$")


@dataclass(frozen=True)
class DigitsSource:
    """`digits`: each recording with an image of its digit that no other clip uses.

    Recordings with index 0-4 are the official test set of FSDD; each is combined with ten images, since there are more
    images than recordings. If a speaker is held out, the test split has this speaker only, and the training split does
    not have this speaker.
    """

    description: ClassVar[str] = "Combine handwritten digits (MNIST) with spoken digits (FSDD)."
    example: ClassVar[str] = (
        "make_shards.py digits shards/digits --images t10k-images-idx3-ubyte.gz "
        "--image-labels t10k-labels-idx1-ubyte.gz --recordings recordings/ --label-noise symmetric:0.6"
    )
    default_encoding: ClassVar[Encoding] = Encoding(short_side=32, clip_s=1.0, sample_rate_hz=8000)
    allowed_modalities: ClassVar[tuple[str, ...]] = ("both",)

    images: Path
    image_labels: Path
    recordings: Path
    degrade: bool = False
    hold_out_speaker: str = ""
    seed: int = 0

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the files of MNIST and FSDD, `--degrade` and `--hold-out-speaker`."""
        add = parser.add_argument
        add("--images", type=Path, required=True, help="MNIST idx3 file, plain or gzipped")
        add("--image-labels", type=Path, required=True, help="MNIST idx1 file, plain or gzipped")
        add("--recordings", type=Path, required=True, help="directory or tar archive of DIGIT_SPEAKER_INDEX.wav")
        add(
            "--degrade",
            action="store_true",
            help="occlude the digit, reduce the contrast, add noise to video and audio",
        )
        add("--hold-out-speaker", default="", metavar="NAME", help="use this speaker in the test split only")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(
            options.images,
            options.image_labels,
            options.recordings,
            options.degrade,
            options.hold_out_speaker,
            options.seed,
        )

    def candidates(self) -> list[ClipSource]:
        """Return each recording with images of its digit.

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
        candidates = []
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
                candidates.append(ClipSource(match[0], NAMES[digit], split, detail=(match[0], image)))
        if not candidates:
            raise UserError(f"--recordings {self.recordings}: no files named DIGIT_SPEAKER_INDEX.wav.")
        return candidates

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Render one clip: the digit moves over a dark background while it is spoken."""
        name, image = candidate.detail
        digit = _read_idx(self.images, 3)[int(image)].astype(np.float32) / 255
        frames = _render_frames(digit, encoding, rng)
        waveform = _render_audio(_read_recordings(self.recordings)[str(name)], encoding, rng)
        if self.degrade:
            frames, waveform = _degrade(frames, waveform, rng)
        pixels = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
        yield Clip(np.repeat(pixels[..., None], 3, axis=3), waveform)


def _render_frames(digit: np.ndarray, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    """Return frames [T, H, W] float32 in which the digit moves along a straight line."""
    from scipy.ndimage import shift  # Takes half a second to import.

    side = encoding.side
    if side < digit.shape[0]:
        raise UserError(f"--short-side={side}: has to be {digit.shape[0]} or more, the size of the digits.")
    max_offset = side - digit.shape[0]
    start, end = rng.uniform(0, max_offset, 2), rng.uniform(0, max_offset, 2)
    canvas = np.zeros((side, side), np.float32)
    canvas[: digit.shape[0], : digit.shape[1]] = digit
    times = np.linspace(0, 1, encoding.num_frames)
    return np.stack([shift(canvas, start + (end - start) * time, order=1) for time in times])


def _render_audio(recording: bytes, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    """Return a waveform [N] with the recording at a random position.

    Raises:
        RejectedClip: if the recording is not a readable WAV file.
    """
    from scipy.signal import resample_poly  # Takes a second to import.

    try:
        waveform, rate = soundfile.read(io.BytesIO(recording), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise RejectedClip(f"not readable: {getattr(error, 'error_string', None) or error}") from None
    waveform = waveform.mean(axis=1)
    if rate != encoding.sample_rate_hz:
        waveform = resample_poly(waveform, encoding.sample_rate_hz, rate).astype(np.float32)
    padding = encoding.num_audio_samples - len(waveform)
    if padding < 0:
        return waveform[: encoding.num_audio_samples]
    before = int(rng.integers(0, padding + 1))
    return np.pad(waveform, (before, padding - before))


def _degrade(frames: np.ndarray, waveform: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make a clip difficult: occluding patch, contrast 0.4-1, pixel noise 0.3, audio at -5 to 10 dB SNR."""
    side = frames.shape[1]
    height, width = rng.integers(side // 5, side // 3 + 1, 2)
    top = int(rng.integers(0, side - height + 1))
    left = int(rng.integers(0, side - width + 1))
    frames = frames * rng.uniform(0.4, 1.0)
    frames[:, top : top + height, left : left + width] = rng.uniform(0, 1)
    frames = frames + rng.normal(0, 0.3, frames.shape)
    snr_db = rng.uniform(-5, 10)
    speech = waveform[np.abs(waveform) > 1e-4]
    power = float(np.mean(speech**2)) if len(speech) else 1e-4
    waveform = waveform + rng.normal(0, np.sqrt(power / 10 ** (snr_db / 10)), waveform.shape)
    return frames, (waveform / max(1.0, float(np.abs(waveform).max()))).astype(np.float32)


@lru_cache(maxsize=4)
def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Return the array in an idx file, plain or gzipped.

    Raises:
        UserError: for a file that is missing, truncated or not an idx file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: truncated or damaged gzip file ({error}); copy it again.") from None
    header_bytes = 4 + 4 * num_dims
    shape = np.frombuffer(content, ">u4", num_dims, 4) if len(content) >= header_bytes else np.zeros(0, np.uint32)
    expected_bytes = header_bytes + int(np.prod(shape, dtype=np.int64))
    if content[:4] != bytes([0, 0, 8, num_dims]) or len(content) != expected_bytes:
        raise UserError(f"{path}: not an idx file of {num_dims}-dimensional unsigned bytes, or truncated.")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape.astype(int))


@lru_cache(maxsize=2)
def _read_recordings(path: Path) -> dict[str, bytes]:
    """Return the WAV files of a directory or tar archive by name.

    Raises:
        UserError: for a path that is missing, or an archive that is truncated or not a tar.
    """
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.glob("*.wav"))}
    if not path.is_file():
        raise UserError(f"--recordings {path}: no such directory or tar archive.")
    try:
        with tarfile.open(path) as tar:
            files = [entry for entry in tar if entry.isfile() and entry.name.endswith(".wav")]
            return {Path(entry.name).name: content.read() for entry in files if (content := tar.extractfile(entry))}
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"--recordings {path}: not a readable tar archive, or truncated: {error}") from None
