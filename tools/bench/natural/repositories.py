"""Public git repositories with data, and the clips that are made of them."""

import io
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from distav.config.errors import UserError


@dataclass(frozen=True)
class Repository:
    """A repository that is cloned to a directory of its own.

    Attributes:
        name: owner and name on GitHub.
        license: license of the data.
        commit: revision of the data.
    """

    name: str
    license: str
    commit: str = "HEAD"

    def folder(self, sources: Path) -> Path:
        """Return the directory of the clone.

        Raises:
            UserError: if it is missing.
        """
        folder = sources / self.name.partition("/")[2]
        done = subprocess.run(
            ["git", "-C", folder, "rev-parse", "--verify", "-q", f"{self.commit}^{{commit}}"],
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(
                f"--sources={sources}: {folder.name} is no clone of the GitHub repository {self.name} with revision "
                f"{self.commit}; clone it there."
            )
        return folder

    def files(self, sources: Path) -> list[str]:
        """Return the paths of all files, sorted."""
        command = ["git", "-C", self.folder(sources), "ls-tree", "-r", "-z", "--name-only", self.commit]
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
        return sorted(filter(None, listed.split("\0")))

    def read(self, sources: Path, paths: Iterable[str]) -> Iterator[bytes]:
        """Yield the contents of files, in order."""
        folder = self.folder(sources)
        with subprocess.Popen(
            ["git", "-C", folder, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout
            for path in paths:
                process.stdin.write(f"{self.commit}:{path}\n".encode())
                process.stdin.flush()
                size = int(process.stdout.readline().split()[-1])
                yield process.stdout.read(size)
                process.stdout.read(1)
            process.stdin.close()


def write_clip(path: Path, frames: np.ndarray, fps: int, audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write a clip to a Matroska file: H.264 at high quality, and uncompressed audio.

    Args:
        path: the file.
        frames: [T, H, W, 3] uint8 RGB.
        fps: frames per second.
        audio: [N] float32 in [-1, 1].
        sample_rate_hz: sample rate of the audio.
    """
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "veryfast"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        sound = file.add_stream("pcm_s16le", rate=sample_rate_hz, layout="mono")
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        samples = (np.clip(audio, -1, 1) * 32767).astype(np.int16)[None]
        block = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
        file.mux(sound.encode(block))
        file.mux(sound.encode(None))


def read_audio(content: bytes, sample_rate_hz: int) -> np.ndarray:
    """Decode an audio file to mono at a sample rate: [N] float32 in [-1, 1]."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate_hz)
    parts = []
    with av.open(io.BytesIO(content), "r") as file:
        for frame in file.decode(audio=0):
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(parts)
