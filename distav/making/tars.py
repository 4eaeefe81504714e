"""Tars of a set and the rows of its index: encoded clips in the order of their ids."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.data.tar import by_key, write_dali_index
from distav.making.chunks import Encoded
from distav.making.clips import Encoding


def key_of(split: str, number: int) -> str:
    """Return the key of a sample."""
    return f"{split}-{number:09d}"


@dataclass(frozen=True)
class Samples:
    """The samples of one split, by id.

    Attributes:
        split: its name.
        clips: N encoded clips.
        donors: [N] the clip whose sound each sample carries.
        members: names of a sample's members and their extensions.
        sounds: the members that are heard, and come from the donor.
        encoding: how clips are stored.
        work: the folder in which the clips lie.
    """

    split: str
    clips: Sequence[Encoded]
    donors: np.ndarray
    members: dict[str, str]
    sounds: frozenset[str]
    encoding: Encoding
    work: Path

    def write(self, out: Path, shard: int, ids: range) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Write a shard, unless it is there; returns what the manifest says of it, and its rows of the index."""
        path = out / f"{self.split}-{shard:06d}.tar"
        if not path.exists():
            self._write_tar(path, ids)
        members = by_key(path)
        write_dali_index(path, members)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        described = {"name": path.name, "clips": len(ids), "bytes": path.stat().st_size, "sha256": digest}
        return described, [self._row(shard, number, members[key_of(self.split, number)]) for number in ids]

    def _holder(self, number: int, member: str) -> Encoded:
        return self.clips[self.donors[number] if member in self.sounds else number]

    def _write_tar(self, path: Path, ids: range) -> None:
        """Write a tar beside its place and rename it."""
        import webdataset.writer  # It brings torch along, which the encoding processes have no use for.

        part = self.work / path.name
        whose = {"mtime": 0, "user": "distav", "group": "distav"}
        with open(part, "wb") as file, webdataset.writer.TarWriter(file, encoder=False, **whose) as tar:
            for number in ids:
                contents = {
                    extension: self._holder(number, member).member(member, self.work)
                    for member, extension in self.members.items()
                }
                facts = json.dumps(self._facts(number, contents), sort_keys=True).encode()
                tar.write({"__key__": key_of(self.split, number), **contents, "json": facts})
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
            "key": key_of(self.split, number),
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
