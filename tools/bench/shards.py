"""Reading samples from tar files by offset with CRC-32 verification, compared with webdataset and plain read()."""

import tempfile
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from distav.data.dataset import Split
from distav.data.pipeline.reader import ShardReader
from distav.data.storage.tar import members_by_key
from tools.bench.timing import Results, Setting

VIDEO_BYTES, AUDIO_BYTES = 300_000, 60_000


def write_shards(directory: Path, samples: int, shard_samples: int) -> Split:
    """Write tar files of random members of typical size, and return their split."""
    import webdataset.writer

    rng = np.random.default_rng(0)
    paths: list[Path] = []
    checksums: dict[str, list[int]] = {"video_crc32": [], "audio_crc32": []}
    for start in range(0, samples, shard_samples):
        paths.append(directory / f"train-{len(paths):06d}.tar")
        with webdataset.writer.TarWriter(str(paths[-1]), mtime=0, encoder=False) as tar:
            for sample in range(start, min(start + shard_samples, samples)):
                video, audio = rng.bytes(VIDEO_BYTES), rng.bytes(AUDIO_BYTES)
                tar.write({"__key__": f"{sample:09d}", "avi": video, "flac": audio, "json": b'{"id": %d}' % sample})
                checksums["video_crc32"].append(crc32(video))
                checksums["audio_crc32"].append(crc32(audio))
    columns = {name: np.array(values, np.uint32) for name, values in checksums.items()}
    columns |= {"id": np.arange(samples), "shard": (np.arange(samples) // shard_samples).astype(np.int32)}
    parts = [
        {extension: (offset, size) for extension, offset, size in members}
        for path in paths
        for members in members_by_key(path).values()
    ]
    for member, extension in (("video", "avi"), ("audio", "flac")):
        columns[f"{member}_offset"] = np.array([part[extension][0] for part in parts])
        columns[f"{member}_bytes"] = np.array([part[extension][1] for part in parts])
    return Split(directory, "train", paths, "mjpeg", 8.0, 16000, columns)


def read_by_offset(split: Split, order: np.ndarray) -> int:
    """Read and verify samples as training does; returns the bytes of video."""
    reader = ShardReader(split)
    try:
        return sum(len(reader.read(int(sample))["video"]) for sample in order)
    finally:
        reader.close()


def read_with_webdataset(split: Split, skip: int = 0) -> int:
    """Iterate over the samples without decoding, up to the first one after `skip` samples if `skip` is not 0."""
    from webdataset.compat import WebDataset

    total = 0
    for number, sample in enumerate(WebDataset(str(split.shards[0]), shardshuffle=False)):
        if number >= skip:
            total += len(sample["avi"]) + len(sample["flac"])
            if skip:
                return total
    return total


def read_file(split: Split) -> int:
    """Read the file sequentially."""
    total = 0
    with open(split.shards[0], "rb", buffering=0) as file:
        while part := file.read(2**20):
            total += len(part)
    return total


def run(setting: Setting, samples: int) -> Results:
    """Measure reading throughput and the time to resume.

    Args:
        setting: rounds; there is one thread.
        samples: samples of the shard, 360 kB each.
    """
    results = Results("shards", {"samples": samples, "sample_bytes": VIDEO_BYTES + AUDIO_BYTES, "threads": 1})
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as directory:
        split = write_shards(Path(directory), samples, samples)
        in_order, shuffled = np.arange(samples), np.random.default_rng(0).permutation(samples)
        candidates = {
            "plain read()": lambda: read_file(split),
            "distav, in order, checked": lambda: read_by_offset(split, in_order),
            "distav, shuffled, checked": lambda: read_by_offset(split, shuffled),
            "webdataset, in order, unchecked": lambda: read_with_webdataset(split),
        }
        seconds = setting.interleaved(candidates)
        results.add_times(seconds, {name: (samples, "samples/s") for name in seconds})
        ours, raw = seconds["distav, in order, checked"], seconds["plain read()"]
        webdataset = seconds["webdataset, in order, unchecked"]
        results.add_ratio("samples/s, distav / webdataset", (webdataset, ours), ">= 2.5")
        results.add_ratio(
            "samples/s, distav (shuffled) / webdataset", (webdataset, seconds["distav, shuffled, checked"])
        )
        results.add_ratio("bytes/s, distav / plain read()", (raw, ours), ">= 0.25")
        late = samples * 9 // 10
        seconds = setting.interleaved(
            {
                "distav, first sample after a resume at 90 %": lambda: read_by_offset(split, shuffled[late : late + 1]),
                "webdataset, first sample after a resume at 90 %": lambda: read_with_webdataset(split, late),
            }
        )
        results.add_times(seconds)
        ours, webdataset = seconds.values()
        results.add_ratio("time to the first sample after a resume, webdataset / distav", (webdataset, ours), ">= 100")
    return results
