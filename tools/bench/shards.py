"""Reading samples from tars by offset with their CRC-32 checked, beside webdataset and beside plain read()."""

import tempfile
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from distav.data.dataset import Split
from distav.data.pipeline.reader import ShardReader
from distav.data.storage.tar import members_by_key
from tools.bench.timing import Results, Setting

VIDEO_BYTES, AUDIO_BYTES = 300_000, 60_000


def write_shard(folder: Path, samples: int) -> Split:
    """Write one tar of random members of the usual size, and return where they lie."""
    import webdataset.writer

    rng = np.random.default_rng(0)
    path = folder / "train-000000.tar"
    checks: dict[str, list[int]] = {"video_crc32": [], "audio_crc32": []}
    with webdataset.writer.TarWriter(str(path), mtime=0, encoder=False) as tar:
        for number in range(samples):
            video, audio = rng.bytes(VIDEO_BYTES), rng.bytes(AUDIO_BYTES)
            tar.write({"__key__": f"{number:09d}", "avi": video, "flac": audio, "json": b'{"id": %d}' % number})
            checks["video_crc32"].append(crc32(video))
            checks["audio_crc32"].append(crc32(audio))
    columns = {name: np.array(values, np.uint32) for name, values in checks.items()}
    columns |= {"id": np.arange(samples), "shard": np.zeros(samples, np.int32)}
    parts = [{extension: (offset, size) for extension, offset, size in each} for each in members_by_key(path).values()]
    for kind, extension in (("video", "avi"), ("audio", "flac")):
        columns[f"{kind}_offset"] = np.array([part[extension][0] for part in parts])
        columns[f"{kind}_bytes"] = np.array([part[extension][1] for part in parts])
    return Split(folder, "train", [path], "mjpeg", 8.0, 16000, columns)


def by_offset(split: Split, order: np.ndarray) -> int:
    """Read and check samples as training does."""
    reader = ShardReader(split)
    try:
        return sum(len(reader.read(int(sample))["video"]) for sample in order)
    finally:
        reader.close()


def by_webdataset(split: Split, skip: int = 0) -> int:
    """Iterate over the samples of the tar without decoding."""
    from webdataset.compat import WebDataset

    total = 0
    for number, sample in enumerate(WebDataset(str(split.shards[0]), shardshuffle=False)):
        if number >= skip:
            total += len(sample["avi"]) + len(sample["flac"])
            if skip:
                return total
    return total


def by_read(split: Split) -> int:
    """Read the file from front to back."""
    total = 0
    with open(split.shards[0], "rb", buffering=0) as file:
        while part := file.read(2**20):
            total += len(part)
    return total


def run(setting: Setting, samples: int) -> Results:
    """Measure reading.

    Args:
        setting: threads (one), rounds.
        samples: samples of the shard, 360 kB each.
    """
    results = Results("shards", {"samples": samples, "sample_bytes": VIDEO_BYTES + AUDIO_BYTES, "threads": 1})
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as name:
        split = write_shard(Path(name), samples)
        in_order, shuffled = np.arange(samples), np.random.default_rng(0).permutation(samples)
        candidates = {
            "plain read()": lambda: by_read(split),
            "distav, in order, checked": lambda: by_offset(split, in_order),
            "distav, shuffled, checked": lambda: by_offset(split, shuffled),
            "webdataset, in order, unchecked": lambda: by_webdataset(split),
        }
        seconds = setting.interleaved(candidates)
        results.add_times(seconds, {each: (samples, "samples/s") for each in seconds})
        ours, theirs, raw = (
            seconds[each] for each in ("distav, in order, checked", "webdataset, in order, unchecked", "plain read()")
        )
        results.add_ratio("samples/s of distav / webdataset", (theirs, ours), ">= 2.5")
        results.add_ratio("samples/s of distav, shuffled / webdataset", (theirs, seconds["distav, shuffled, checked"]))
        results.add_ratio("bytes/s of distav / plain read()", (raw, ours), ">= 0.25")
        late = samples * 9 // 10
        seconds = setting.interleaved(
            {
                "distav, first sample after a resume at 90 %": lambda: by_offset(split, shuffled[late : late + 1]),
                "webdataset, the same by skipping": lambda: by_webdataset(split, late),
            }
        )
        results.add_times(seconds)
        ours, theirs = seconds.values()
        results.add_ratio("resume, webdataset / distav", (theirs, ours), ">= 100")
    return results
