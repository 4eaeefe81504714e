"""Shards of remote datasets are downloaded in parts ahead of their use, once per machine and within the cache limit."""

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distav.config import loading
from distav.config.schema import DataConfig
from distav.data.data_module import DataModule
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import ShardReader
from distav.data.pipeline.sampler import PADDING, permutation
from distav.data.storage import object_store, parts
from distav.data.storage.cache import LOCKS, Cache
from distav.data.storage.locks import NamedLocks
from distav.data.storage.object_store import ObjectStore
from distav.data.storage.parts import PartLayout
from distav.data.storage.prefetch import PartPrefetcher
from tests.helpers.launch import tiny_config
from tests.helpers.stores import Web, cached_range_bytes, read_batches, read_in_process, web

PART_BYTES = 60_000
"""Bytes of a part in these tests: about two samples."""
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site(tiny_shards: Path, tmp_path: Path) -> Iterator[Web]:
    with web(Path(shutil.copytree(tiny_shards, tmp_path / "site"))) as server:
        yield server


def open_split(site: Web, tmp_path: Path, cache_bytes: int = 64 << 20) -> Split:
    split = ShardedDataset.open(site.url, str(tmp_path / "cache"), 64).split("train")
    assert split.remote
    split.remote.cache.max_bytes = cache_bytes
    site.requests.clear()
    return split


def shuffled(split: Split, epoch: int, batch: int = 8, block: int = 64) -> list[np.ndarray]:
    order = permutation(split.shard_sizes, 0, epoch, block)
    return np.array_split(order, -(-len(order) // batch))


def local_samples(folder: Path) -> dict[int, dict[str, bytes]]:
    split = ShardedDataset.open(folder).split("train")
    reader = ShardReader(split)
    return {sample: reader.read(sample) for sample in range(len(split))}


def part_ranges(site: Web) -> list[tuple[str, str]]:
    """Path and Range header of every part of the training shards."""
    ranges = []
    for path in site.folder.glob("train-*.tar"):
        size = path.stat().st_size
        step = -(-size // -(-size // parts.PART_BYTES))
        ranges += [(path.name, f"bytes={start}-{min(start + step, size) - 1}") for start in range(0, size, step)]
    return sorted(ranges)


def test_parts_are_downloaded_once_and_samples_equal_those_of_a_directory(site: Web, tiny_shards: Path, tmp_path: Path):
    split = open_split(site, tmp_path)
    expected = local_samples(tiny_shards)
    for epoch in range(2):
        assert read_batches(split, shuffled(split, epoch)) == expected
    assert sorted(site.shard_requests()) == part_ranges(site)
    assert len(site.shard_requests()) < len(split)
    reader = ShardReader(open_split(site, tmp_path))  # Without a plan, cached parts are used too.
    assert {sample: reader.read(sample) for sample in range(len(split))} == expected and not site.shard_requests()


def test_samples_larger_than_a_part_are_joined(
    site: Web, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, "PART_BYTES", 10_000)
    split = open_split(site, tmp_path)
    assert read_batches(split, shuffled(split, 0)) == local_samples(tiny_shards)
    assert len(split) < len(site.shard_requests()) <= len(part_ranges(site))


def test_few_samples_of_a_shard_are_requested_alone(site: Web, tiny_shards: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    split, expected = open_split(site, tmp_path), local_samples(tiny_shards)
    ids = np.array([3, PADDING, 41, 90, PADDING])
    samples = read_batches(split, [ids[:3], ids[3:]])
    assert samples == {sample: expected[sample] for sample in (3, 41, 90)}
    assert len(site.shard_requests()) == 3
    # An eighth of each part per epoch, but all of it in eight epochs: more than the next block is planned.
    split = open_split(site, tmp_path / "epochs")
    eighths = [np.arange(start, 96, 8) for start in range(8)]
    assert read_batches(split, eighths, block_shards=1) == expected and len(site.shard_requests()) == 3


def test_ranks_of_a_machine_plan_together(site: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rank that reads an eighth of each part downloads it if seven others read the rest."""
    for local_size, num_requests in (("8", 3), ("1", 12)):
        monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
        for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": local_size, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        split = open_split(site, tmp_path / local_size)
        assert len(read_batches(split, np.arange(0, 96, 8).reshape(-1, 4))) == 12
        assert len(site.shard_requests()) == num_requests


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_limit_of_the_cache_holds_while_a_larger_dataset_is_read(
    site: Web, tiny_shards: Path, tmp_path: Path, fraction: float
):
    expected = local_samples(tiny_shards)
    limit = int(fraction * sum(path.stat().st_size for path in site.folder.glob("train-*.tar")))
    split = open_split(site, tmp_path, limit)
    used, counts = list[int](), list[int]()
    for epoch in range(5):
        site.requests.clear()
        measure = lambda number: used.append(cached_range_bytes(tmp_path / "cache"))  # noqa: E731
        assert read_batches(split, shuffled(split, epoch, batch=4, block=1), 1, measure) == expected
        counts.append(len(site.shard_requests()))
    assert 0.5 * limit < max(used) <= limit
    num_parts = len(part_ranges(site))
    if fraction == 0.9:  # Every part once, and then those that were evicted.
        assert counts[0] == num_parts and max(counts[1:]) <= 0.4 * num_parts
    else:  # There is no room for two blocks, so that some samples are requested alone.
        assert max(counts) <= 0.8 * len(split)


def test_samples_without_room_in_the_cache_are_requested_alone(site: Web, tiny_shards: Path, tmp_path: Path):
    split = open_split(site, tmp_path, 100_000)
    used: list[int] = []
    measure = lambda number: used.append(cached_range_bytes(tmp_path / "cache"))  # noqa: E731
    assert read_batches(split, shuffled(split, 0), 64, measure) == local_samples(tiny_shards)
    assert max(used) <= 100_000 and 20 < len(site.shard_requests()) < 96 + len(part_ranges(site))
    uncached = open_split(site, tmp_path / "none", 0)
    assert read_batches(uncached, shuffled(split, 0)) == local_samples(tiny_shards)
    assert len(site.shard_requests()) == 96 and not list((tmp_path / "none").rglob("*.tar/*"))


FAULTS: dict[str, Callable[[str, int], int | str]] = {
    "short response": lambda path, attempt: "truncated" if attempt < 2 else "",
    "interrupted connection": lambda path, attempt: "reset" if attempt < 2 else "",
    "throttling": lambda path, attempt: 503 if attempt < 2 else "",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_downloads_are_repeated(site: Web, tiny_shards: Path, tmp_path: Path, fault: str):
    split = open_split(site, tmp_path)
    site.fails = FAULTS[fault]
    assert read_batches(split, shuffled(split, 0)) == local_samples(tiny_shards)
    assert sorted(site.shard_requests()) == sorted(3 * part_ranges(site))
    assert not list((tmp_path / "cache" / "parts").iterdir())


def test_samples_of_a_part_that_cannot_be_downloaded_are_requested_alone(
    site: Web, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    split = open_split(site, tmp_path)
    site.largest_range = (site.folder / "train-000002.tar").stat().st_size
    assert read_batches(split, shuffled(split, 0)) == local_samples(tiny_shards)
    assert len(site.shard_requests()) == 3 + split.shard_sizes[0] + split.shard_sizes[1]


def test_repeated_samples_are_read_from_one_download(site: Web, tiny_shards: Path, tmp_path: Path):
    split = open_split(site, tmp_path)
    draws = np.random.default_rng(0).permutation(np.repeat(np.arange(96), 2))
    assert read_batches(split, np.array_split(draws, 20)) == local_samples(tiny_shards)
    assert sorted(site.shard_requests()) == part_ranges(site)


def test_sample_that_is_corrupt_in_the_store_is_quarantined(site: Web, tmp_path: Path):
    split = open_split(site, tmp_path)
    offset, size = (int(split.columns[f"video_{column}"][3]) for column in ("offset", "bytes"))
    with open(site.folder / "train-000000.tar", "r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"\x00\xff")
    data = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)
    loader = Loader(split, data, None, 0, 8, torch.device("cpu"))
    batches = list(loader.batches((ids, 0) for ids in shuffled(split, 0)))
    loader.close()
    assert sum(int(batch.valid.sum()) for batch in batches) == 95
    assert loader.quarantine.reasons == {3: "video altered in train-000000.tar: CRC-32 differs"}
    assert len(site.shard_requests()) == len(part_ranges(site)) + 1  # The sample was requested again, its part was not.


def test_corrupt_parts_are_downloaded_again(site: Web, tiny_shards: Path, tmp_path: Path):
    split, expected = open_split(site, tmp_path), local_samples(tiny_shards)
    read_batches(split, shuffled(split, 0))
    cached = sorted((tmp_path / "cache").rglob("train-000000.tar/*"))
    content = {path: path.read_bytes() for path in cached}
    for path, damaged in zip(cached, (b"", content[cached[1]][:-1], bytes(PART_BYTES)), strict=False):
        path.write_bytes(damaged)
    for _ in range(2):
        site.requests.clear()
        assert read_batches(split, shuffled(split, 1)) == expected
    assert not site.shard_requests()
    assert all(path.read_bytes() == content[path] for path in cached if path.exists())


def test_interrupted_process_keeps_complete_parts(site: Web, tiny_shards: Path, tmp_path: Path):
    blocked, lock = threading.Event(), threading.Lock()

    def fails(path: str, attempt: int) -> str:
        with lock:
            number = len(site.shard_requests())
        if number > 10:
            blocked.wait(30)
        return ""

    site.fails = fails
    process = SPAWN.Process(target=read_in_process, args=(site.url, tmp_path / "cache", PART_BYTES, 0))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").rglob("*.tar/*"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    complete = {path.relative_to(path.parents[1]) for path in (tmp_path / "cache").rglob("*.tar/*")}
    assert len(complete) == 10 and list((tmp_path / "cache" / "parts").iterdir())
    blocked.set()
    split = open_split(site, tmp_path)
    assert read_batches(split, shuffled(split, 0)) == local_samples(tiny_shards)
    assert len(site.shard_requests()) == len(part_ranges(site)) - 10


def test_processes_that_share_a_cache_download_each_part_once(site: Web, tmp_path: Path):
    def fails(path: str, attempt: int) -> str:
        time.sleep(0.05)
        return ""

    site.fails = fails
    processes = [
        SPAWN.Process(target=read_in_process, args=(site.url, tmp_path / "cache", PART_BYTES, seed)) for seed in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(site.shard_requests()) == part_ranges(site)


def test_locks_exclude_other_objects_and_end_with_their_process(tmp_path: Path):
    first, second = NamedLocks(tmp_path / LOCKS), NamedLocks(tmp_path / LOCKS)
    first.share("a")
    second.share("a")
    assert not first.try_acquire("a") and first.try_acquire("b") and not second.try_acquire("b")
    second.release("a")
    assert first.try_acquire("a") and not second.try_acquire("a")
    first.close()
    assert second.try_acquire("a") and second.try_acquire("b")
    second.close()
    assert (tmp_path / LOCKS).stat().st_size == 0


def test_locked_shards_are_not_evicted(tmp_path: Path):
    cache, locks = Cache(tmp_path, "dataset", 10_000), NamedLocks(tmp_path / "dataset" / LOCKS)

    def store(name: str) -> bool:
        reserved = cache.reserve(1000)
        if reserved:
            cache.store(reserved, name, bytes(1000))
        return reserved is not None

    for number in range(10):
        assert store(f"{number // 5}.tar/{number}")
        os.utime(tmp_path / "dataset" / f"{number // 5}.tar" / str(number), (number, number))
    locks.share("1.tar")
    assert store("2.tar/0")
    # Those that were used last are evicted first, without those of the locked shard.
    assert {path.name for path in (tmp_path / "dataset" / "0.tar").iterdir()} == {"0", "1", "2"}
    assert len(list((tmp_path / "dataset" / "1.tar").iterdir())) == 5
    locks.share("0.tar")
    locks.share("2.tar")
    assert store("3.tar/0")
    locks.share("3.tar")
    assert not store("3.tar/1") and cache.reserve(20_000) is None
    locks.close()
    assert store("3.tar/1")


def test_reserved_files_count_and_are_released(tmp_path: Path):
    cache = Cache(tmp_path, "dataset", 2500)
    reserved = [cache.reserve(1000), cache.reserve(1000)]
    (tmp_path / "used").unlink()  # The files are counted again.
    assert cache.reserve(1000) is None and reserved[0]
    cache.discard(reserved[0])
    assert cache.reserve(1000) is not None


def test_layout_of_parts():
    layout = PartLayout(["a.tar", "b.tar"], np.array([250, 100]), 100)
    assert layout.first.tolist() == [0, 3, 4] and layout.size.tolist() == [84, 84, 82, 100]
    shards, starts, ends = np.array([0, 1, 0]), np.array([80, 0, 168]), np.array([170, 100, 169])
    found, sizes = layout.of_ranges(shards, starts, ends)
    assert found.tolist() == [0, 1, 2, 3, 2] and sizes.tolist() == [4, 84, 2, 100, 1]
    assert layout.of_range(0, 80, 170) == [(0, 80, 84), (1, 84, 168), (2, 168, 170)]
    assert layout.name(2) == "a.tar/168-82"


def test_closing_wakes_waiting_readers(site: Web, tmp_path: Path):
    split = open_split(site, tmp_path)
    reader, event = ShardReader(split), threading.Event()
    assert isinstance(split.remote, ObjectStore) and reader.layout
    site.fails = lambda path, attempt: "" if event.wait(30) else ""
    prefetcher = PartPrefetcher(split.remote, reader.layout)
    ranges = np.array([0]), np.array([0]), np.array([PART_BYTES])
    prefetcher.plan(*ranges)
    prefetcher.want(*ranges)
    results: list[bytes | None] = []
    thread = threading.Thread(target=lambda: results.append(prefetcher.read(0, 0, PART_BYTES)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    prefetcher.close()
    thread.join(10)
    assert results == [None]
    prefetcher.done(0, 0, PART_BYTES)
    event.set()


def test_small_cache_is_reported(site: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    options = [f"data.root={site.url}", f"data.cache={tmp_path / 'cache'}", "data.shuffle_block_shards=1"]
    config = loading.load(tiny_config(tmp_path), options)
    for cache_mib in (0, 2):
        config.data.cache_mib = cache_mib
        DataModule.open(config)
    assert not caplog.messages
    config.data.cache_mib = 1
    DataModule.open(config)
    assert len(caplog.messages) == 1
    assert "data.cache_mib=1: two blocks of data.shuffle_block_shards=1 shards have 2 MiB" in caplog.messages[0]
    assert "set data.cache_mib=2" in caplog.messages[0]
