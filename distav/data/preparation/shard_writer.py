"""Write the shards of a split, and the rows of the index that locate its samples."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from distav.data.files import temporary_path
from distav.data.preparation.encode_workers import EncodedClip
from distav.data.preparation.encoding import Encoding
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
        members: names of the members of a sample, with their file extensions.
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

    def write(self, out: Path, shard_samples: int, workers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Write the shards that do not exist yet.

        Returns:
            The entries of the shards for the manifest, and the rows of the index.
        """
        starts = range(0, len(self.clips), shard_samples)
        shards = [range(start, min(start + shard_samples, len(self.clips))) for start in starts]
        # Threads suffice: reading, hashing and writing release the global interpreter lock.
        with ThreadPoolExecutor(max(1, min(workers, len(shards)))) as pool:
            written = list(pool.map(self._write_shard, repeat(out), range(len(shards)), shards))
        return [entry for entry, _ in written], [row for _, rows in written for row in rows]

    def _write_shard(self, out: Path, shard: int, ids: range) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        path = out / f"{self.split}-{shard:06d}.tar"
        if not path.exists():
            self._write_tar(path, ids)
        members = members_by_key(path)
        write_dali_index(path, members, self.scratch)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entry = {"name": path.name, "clips": len(ids), "bytes": path.stat().st_size, "sha256": digest}
        return entry, [self._index_row(shard, sample, members[self.keys[sample]]) for sample in ids]

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
                    extension: self._clip_of(sample, member).read_member(member, self.folder)
                    for member, extension in self.members.items()
                }
                metadata = json.dumps(self._metadata(sample, contents), sort_keys=True).encode()
                tar.write({"__key__": self.keys[sample], **contents, "json": metadata})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def _metadata(self, sample: int, contents: dict[str, bytes]) -> dict[str, Any]:
        """Return the content of the JSON member."""
        clip, encoding = self.clips[sample], self.encoding
        rates = {"fps": encoding.fps, "frames": encoding.num_frames, "sample_rate_hz": encoding.sample_rate_hz}
        return {
            "id": sample,
            "source": clip.source,
            "start_s": clip.start_s,
            "duration_s": encoding.clip_s,
            **(rates if "video" in self.members else {}),
            **({"repairs": clip.repairs} if clip.repairs else {}),
            "sha256": {extension: hashlib.sha256(content).hexdigest() for extension, content in contents.items()},
        }

    def _index_row(self, shard: int, sample: int, entries: list[tuple[str, int, int]]) -> dict[str, Any]:
        """Return the row of a sample, given extension, offset and size of its members in the tar."""
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
            "frames": self.encoding.num_frames,
            "width": clip.width,
            "height": clip.height,
        }
        for member, extension in self.members.items():
            row[f"{member}_offset"], row[f"{member}_bytes"] = positions[extension]
            row[f"{member}_crc32"] = self._clip_of(sample, member).members[member][2]
        return row
