"""Write the shards of a split, and the rows of the index that locate its samples."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.console import show_progress
from distav.data.files import temporary_path, write_atomically
from distav.data.preparation.encode_workers import EncodedClip
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.shared_work import Part, wait_for_others
from distav.data.storage.tar import members_by_key, write_dali_index


def sample_keys(split: str, count: int) -> list[str]:
    """Return the keys of the samples of a split."""
    return [f"{split}-{number:09d}" for number in range(count)]


@dataclass(frozen=True)
class SplitWriter:
    """Writes the samples of one split, in the order of their ids.

    Attributes:
        split: name of the split.
        keys: N keys.
        clips: N encoded clips.
        audio_source: [N] int64, the id of the clip whose audio each sample gets.
        members: names of the members of a complete sample, with their file extensions.
        audio_members: the members that are taken from the audio source.
        encoding: how clips are stored.
        folder: directory that contains the files of the encoded clips.
        scratch: directory of files that are not complete yet.
    """

    split: str
    keys: Sequence[str]
    clips: Sequence[EncodedClip]
    audio_source: np.ndarray
    members: dict[str, str]
    audio_members: frozenset[str]
    encoding: Encoding
    folder: Path
    scratch: Path

    def write(self, out: Path, shard_samples: int, workers: int, part: Part | None = None) -> bool:
        """Write the shards of a part, all by default, that do not exist yet; return whether all shards exist."""
        shards = self._shards(shard_samples)
        names = list(shards)

        def is_written(name: str) -> bool:
            return self._rows_path(name).exists() and (out / f"{name}.tar").exists()

        own = [names[index] for index in (part or Part()).indices(len(names))]
        sizes = {name: len(shards[name]) for name in own if not is_written(name)}
        with (
            (part or Part()).work(self.scratch, names, is_written) as work,
            show_progress(sum(sizes.values()), "clips", f"writing {self.split}") as writing,
        ):

            def write_shards() -> None:
                while (name := work.next()) is not None:
                    self._write_shard(out, name, names.index(name), shards[name])
                    work.release(name)
                    writing.advance(len(shards[name]))

            while not work.finished():
                # Threads suffice: reading, hashing and writing release the global interpreter lock.
                num_threads = max(1, min(workers, len(shards)))
                with ThreadPoolExecutor(num_threads) as pool:
                    for future in [pool.submit(write_shards) for _ in range(num_threads)]:
                        future.result()
                if not work.finished():
                    wait_for_others()
        return all(map(is_written, names))

    def collect(self, shard_samples: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the entries of all shards for the manifest, and the rows of the index."""
        written = [json.loads(self._rows_path(name).read_text()) for name in self._shards(shard_samples)]
        return [entry for entry, _ in written], [row for _, rows in written for row in rows]

    def _shards(self, shard_samples: int) -> dict[str, range]:
        """Return the ids of the samples of each shard by its name."""
        starts = range(0, len(self.clips), shard_samples)
        return {
            f"{self.split}-{number:06d}": range(start, min(start + shard_samples, len(self.clips)))
            for number, start in enumerate(starts)
        }

    def _rows_path(self, name: str) -> Path:
        """Return the file with the entry and the index rows of a shard, which is written when the shard is complete."""
        return self.scratch / f"{name}.rows.json"

    def _write_shard(self, out: Path, name: str, shard: int, ids: range) -> None:
        path = out / f"{name}.tar"
        if not path.exists():
            self._write_tar(path, ids)
        members = members_by_key(path)
        write_dali_index(path, members, self.scratch)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entry = {"name": path.name, "clips": len(ids), "bytes": path.stat().st_size, "sha256": digest}
        rows = [self._index_row(shard, sample, members[self.keys[sample]]) for sample in ids]
        write_atomically(self._rows_path(name), json.dumps([entry, rows]).encode(), self.scratch)

    def _clip_of(self, sample: int, member: str) -> EncodedClip:
        """Return the clip that a member of a sample is taken from."""
        return self.clips[self.audio_source[sample] if member in self.audio_members else sample]

    def _write_tar(self, path: Path, ids: range) -> None:
        """Write a tar to the scratch directory and rename it when it is complete."""
        import webdataset.writer  # It imports torch, which the encoding processes do not need.

        temporary = temporary_path(path, self.scratch)
        owner = {"mtime": 0, "user": "distav", "group": "distav"}
        with open(temporary, "wb") as file, webdataset.writer.TarWriter(file, encoder=False, **owner) as tar:
            for sample in ids:
                contents = {
                    extension: clip.read_member(member, self.folder)
                    for member, extension in self.members.items()
                    if member in (clip := self._clip_of(sample, member)).members
                }
                metadata = json.dumps(self._metadata(sample, contents), sort_keys=True).encode()
                tar.write({"__key__": self.keys[sample], **contents, "json": metadata})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def _metadata(self, sample: int, contents: dict[str, bytes]) -> dict[str, Any]:
        """Return the content of the JSON member."""
        clip, encoding = self.clips[sample], self.encoding
        rates = {"fps": encoding.fps, "frames": self._num_frames(sample), "sample_rate_hz": encoding.sample_rate_hz}
        return {
            "id": sample,
            "source": clip.source,
            "start_s": clip.start_s,
            "duration_s": encoding.clip_s,
            **(rates if "video" in self.members else {}),
            **({"repairs": clip.repairs} if clip.repairs else {}),
            "sha256": {extension: hashlib.sha256(content).hexdigest() for extension, content in contents.items()},
        }

    def _num_frames(self, sample: int) -> int:
        """Return the number of frames of a sample; 0 without video."""
        return self.encoding.num_frames if "video" in self.clips[sample].members else 0

    def _index_row(self, shard: int, sample: int, entries: list[tuple[str, int, int]]) -> dict[str, Any]:
        """Return the row of a sample, given extension, offset and size of its members in the tar.

        Offset, size and CRC-32 of members that the sample lacks are 0.
        """
        clip = self.clips[sample]
        positions = {extension: (offset, size) for extension, offset, size in entries}
        row = {
            "split": self.split,
            "id": sample,
            "key": self.keys[sample],
            "shard": shard,
            "source": clip.source,
            "start_s": clip.start_s,
            "duration_s": self.encoding.clip_s,
            "frames": self._num_frames(sample),
            "width": clip.width,
            "height": clip.height,
        }
        for member, extension in self.members.items():
            members = self._clip_of(sample, member).members
            row[f"{member}_offset"], row[f"{member}_bytes"] = positions[extension] if member in members else (0, 0)
            row[f"{member}_crc32"] = members[member][2] if member in members else 0
        return row
