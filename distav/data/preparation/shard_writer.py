"""Tars of a set and the rows of its index: encoded clips in the order of their ids."""

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
    """The samples of one split, by id.

    Attributes:
        split: its name.
        keys: N keys.
        clips: N encoded clips.
        donors: [N] the clip whose sound each sample carries.
        members: names of a sample's members and their extensions.
        sounds: the members that are heard, and come from the donor.
        encoding: how clips are stored.
        folder: in which the clips lie.
        scratch: the folder in which files lie until they are whole.
    """

    split: str
    keys: Sequence[str]
    clips: Sequence[EncodedClip]
    audio_source: np.ndarray
    members: dict[str, str]
    sounds: frozenset[str]
    encoding: Encoding
    folder: Path
    scratch: Path

    def write(self, out: Path, shard_samples: int, workers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Write the shards that are not there; returns what the manifest says of each, and the rows of the index."""
        starts = range(0, len(self.clips), shard_samples)
        every = [range(start, min(start + shard_samples, len(self.clips))) for start in starts]
        # Reading, hashing and writing leave the interpreter to other threads.
        with ThreadPoolExecutor(max(1, min(workers, len(every)))) as pool:
            written = list(pool.map(self._write_shard, repeat(out), range(len(every)), every))
        return [each for each, _ in written], [row for _, rows in written for row in rows]

    def _write_shard(self, out: Path, shard: int, ids: range) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        path = out / f"{self.split}-{shard:06d}.tar"
        if not path.exists():
            self._write_tar(path, ids)
        members = members_by_key(path)
        write_dali_index(path, members, self.scratch)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described = {"name": path.name, "clips": len(ids), "bytes": path.stat().st_size, "sha256": digest}
        return described, [self._row(shard, number, members[self.keys[number]]) for number in ids]

    def _holder(self, number: int, member: str) -> EncodedClip:
        return self.clips[self.audio_source[number] if member in self.sounds else number]

    def _write_tar(self, path: Path, ids: range) -> None:
        """Write a tar beside its place and rename it."""
        import webdataset.writer  # It brings torch along, which the encoding processes have no use for.

        part = temporary_path(path, self.scratch)
        whose = {"mtime": 0, "user": "distav", "group": "distav"}
        with open(part, "wb") as file, webdataset.writer.TarWriter(file, encoder=False, **whose) as tar:
            for number in ids:
                contents = {
                    extension: self._holder(number, member).member(member, self.folder)
                    for member, extension in self.members.items()
                }
                facts = json.dumps(self._facts(number, contents), sort_keys=True).encode()
                tar.write({"__key__": self.keys[number], **contents, "json": facts})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)

    def _facts(self, number: int, contents: dict[str, bytes]) -> dict[str, Any]:
        clip, encoding = self.clips[number], self.encoding
        rates = {"fps": encoding.fps, "frames": encoding.num_frames, "sample_rate_hz": encoding.sample_rate_hz}
        return {
            "id": number,
            "source": clip.source,
            "start_s": clip.start_s,
            "duration_s": encoding.clip_s,
            **(rates if "video" in self.members else {}),
            "sha256": {extension: hashlib.sha256(content).hexdigest() for extension, content in contents.items()},
        }

    def _row(self, shard: int, number: int, parts: list[tuple[str, int, int]]) -> dict[str, Any]:
        clip, places = self.clips[number], {extension: (offset, size) for extension, offset, size in parts}
        row = {
            "split": self.split,
            "id": number,
            "key": self.keys[number],
            "shard": shard,
            "source": clip.source,
            "start_s": clip.start_s,
            "duration_s": self.encoding.clip_s,
            "frames": self.encoding.num_frames,
            "width": clip.width,
            "height": clip.height,
        }
        for member, extension in self.members.items():
            row[f"{member}_offset"], row[f"{member}_bytes"] = places[extension]
            row[f"{member}_crc32"] = self._holder(number, member).members[member][2]
        return row
