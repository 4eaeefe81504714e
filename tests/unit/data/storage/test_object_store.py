"""Datasets in object stores give the same samples as a local directory, survive failures, and are cached."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import AugmentConfig, DataConfig, SyntheticConfig
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import CorruptSampleError, ShardReader
from distav.data.preparation.quickstart import render_missing_dataset
from distav.data.storage import object_store
from distav.data.storage.cache import Cache
from distav.data.storage.prefetch import PartPrefetcher
from tests.helpers.launch import tiny_config
from tests.helpers.stores import CREDENTIALS, Bucket, Web, bucket, bytes_in, use_cache, web
from tests.robustness.test_data import inspect, overwrite

DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)
MIB = 64


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def store() -> Iterator[Bucket]:
    with bucket() as store:
        yield store


@pytest.fixture
def s3(store: Bucket, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URL of the dataset in a bucket, with a path of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.environment["AWS_ENDPOINT_URL"])
    return store.put(tiny_shards, f"{request.node.name}/a b")


@pytest.fixture
def site(tiny_shards: Path, tmp_path: Path) -> Iterator[Web]:
    with web(Path(shutil.copytree(tiny_shards, tmp_path / "site"))) as server:
        yield server


def open_remote(url: str, tmp_path: Path, cache_mib: int = MIB) -> ShardedDataset:
    return ShardedDataset.open(url, str(tmp_path / "cache"), cache_mib)


def batches(shards: ShardedDataset, epoch: int) -> list:
    loader = Loader(shards.split("train"), DATA, AugmentConfig(), 0, 16, torch.device("cpu"))
    order = np.random.default_rng(epoch).permutation(len(loader.split)).reshape(-1, 16)
    try:
        return list(loader.batches((ids, epoch) for ids in order))
    finally:
        loader.close()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the requested objects."""
    names: list[str] = []
    original = object_store.ObjectStore.read_range

    def request_range(self: object_store.ObjectStore, name: str, offset: int, size: int) -> bytes:
        names.append(name)
        return original(self, name, offset, size)

    monkeypatch.setattr(object_store.ObjectStore, "read_range", request_range)
    return names


def test_batches_from_s3_equal_local_ones_and_are_downloaded_once(
    s3: str, tiny_shards: Path, tmp_path: Path, requests: list[str]
):
    local = ShardedDataset.open(tiny_shards)
    for epoch, num_requests in ((0, 3), (1, 0)):  # One request per shard; none in the second epoch.
        remote = open_remote(s3, tmp_path)
        requests.clear()
        for expected, actual in zip(batches(local, epoch), batches(remote, epoch), strict=True):
            assert torch.equal(expected.ids, actual.ids) and torch.equal(expected.seeds, actual.seeds)
            assert actual.valid.all()
            assert all(torch.equal(values, actual.media[name]) for name, values in expected.media.items())
        assert len(requests) == num_requests
    expected, actual = (load_labels(shards, shards.split("train")) for shards in (local, remote))
    assert np.array_equal(expected.given, actual.given) and local.classes == remote.classes
    assert not list((tmp_path / "cache").rglob("*.tar/*.tar")) and remote.location == s3


def _read_and_fork(s3: str, folder: Path) -> None:
    split = open_remote(s3, folder, 0).split("train")
    expected = ShardReader(split).read(3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if ShardReader(split).read(3) == expected else 1)
    sys.exit(os.waitpid(child, 0)[1] != 0)


def test_forked_process_reads_a_split_that_its_parent_opened(s3: str, tmp_path: Path):
    # In a process of its own, since libraries that other tests import do not survive a fork.
    parent = multiprocessing.get_context("spawn").Process(target=_read_and_fork, args=(s3, tmp_path))
    parent.start()
    parent.join(120)
    assert parent.exitcode == 0


def test_new_dataset_at_the_same_url_does_not_use_old_cached_tables(
    store: Bucket, s3: str, tiny_shards: Path, tmp_path: Path
):
    first = open_remote(s3, tmp_path).split("train")
    ShardReader(first).read(0)
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].pop()
    key = s3.removeprefix("s3://clips/")
    store.client.put_object(Bucket="clips", Key=f"{key}/manifest.json", Body=json.dumps(manifest).encode())
    store.client.put_object(Bucket="clips", Key=f"{key}/labels.parquet", Body=b"other")
    shards = open_remote(s3, tmp_path)
    assert len(shards.split("train").shards) == len(first.shards) - 1
    with pytest.raises(UserError, match=r"s3://clips/.*labels.parquet has 5 bytes"):
        shards.table("labels.parquet", "train")


def test_missing_and_truncated_objects_are_reported(store: Bucket, s3: str, tiny_shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"data.root=s3://none/dataset: no manifest.json found .*make_shards"):
        open_remote("s3://none/dataset", tmp_path)
    with pytest.raises(UserError, match=r"no manifest.json found"):
        open_remote("s3://clips/none", tmp_path)
    shard = {"Bucket": "clips", "Key": f"{s3.removeprefix('s3://clips/')}/train-000001.tar"}
    store.client.put_object(**shard, Body=b"cut")
    with pytest.raises(UserError, match=r"s3://clips/.*/train-000001.tar: 3 bytes, expected \d+"):
        open_remote(s3, tmp_path).split("train")
    store.client.delete_object(**shard)
    with pytest.raises(UserError, match=r"train-000001.tar: no file, expected \d+"):
        open_remote(s3, tmp_path).split("train")
    open_remote(s3, tmp_path).split("test")


def test_verify_reads_a_url(store: Bucket, s3: str, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, output = inspect(s3)  # pyright: ignore[reportArgumentType]
    assert status == 0 and f"{s3}: every file" in output, output
    content = bytearray((tiny_shards / "train-000001.tar").read_bytes())
    content[700] ^= 1
    key = s3.removeprefix("s3://clips/")
    store.client.put_object(Bucket="clips", Key=f"{key}/train-000001.tar", Body=bytes(content))
    store.client.put_object(Bucket="clips", Key=f"{key}/train-000009.tar", Body=b"")
    store.client.delete_object(Bucket="clips", Key=f"{key}/test-000000.idx")
    status, output = inspect(s3)  # pyright: ignore[reportArgumentType]
    assert status == 2 and "3 faults" in output, output
    assert f"{s3}/train-000001.tar: 'train-000000040': video altered" in output
    assert f"{s3}/train-000009.tar: this shard is not listed in manifest.json" in output
    assert f"{s3}/test-000000.idx: No such file" in output


FAILURES = {
    "throttling": lambda path, attempt: 503 if attempt < 3 else "",
    "too many requests": lambda path, attempt: 429 if attempt < 2 else "",
    "connection reset": lambda path, attempt: "reset" if attempt < 3 else "",
    "truncated response": lambda path, attempt: "truncated" if attempt < 3 else "",
    "mixed": lambda path, attempt: [500, "reset", "truncated", 408, 502, ""][attempt % 6],
}  # fmt: skip


@pytest.fixture(params=["http", "s3"])
def address(site: Web, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The site as a web server, and as an S3 store without listings."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{site.server_port}")
    return {"http": site.url, "s3": "s3://dataset"}[request.param]


@pytest.mark.parametrize("failure", FAILURES)
def test_samples_are_correct_after_temporary_failures(
    site: Web, address: str, tiny_shards: Path, tmp_path: Path, failure: str
):
    site.fails = FAILURES[failure]
    remote, local = open_remote(address, tmp_path), ShardedDataset.open(tiny_shards)
    remote_reader, local_reader = (ShardReader(shards.split("train")) for shards in (remote, local))
    for sample in (0, 41, 95):
        assert remote_reader.read(sample) == local_reader.read(sample)
    assert len(set(site.requests)) < len(site.requests)


@pytest.mark.parametrize("fault", [503, "truncated"])
def test_attempts_are_limited_and_only_samples_of_the_failing_shard_are_quarantined(
    site: Web, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str
):
    waits: list[float] = []
    split = open_remote(address, tmp_path).split("train")
    site.fails = lambda path, attempt: fault if path == "train-000001.tar" else ""
    site.requests.clear()
    loader = Loader(split, DATA, None, 0, 3, torch.device("cpu"))
    monkeypatch.setattr(object_store.time, "sleep", waits.append)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 1.0)
    batch = loader.load(np.array([0, 41, 95]), 0)
    loader.close()
    assert batch.valid.tolist() == [True, False, True]
    assert "train-000001.tar cannot be read (" in loader.quarantine.reasons[41]
    attempts = [request for request in site.requests if request[1] == "train-000001.tar"]
    assert len(attempts) == object_store.MAX_ATTEMPTS and len(waits) == object_store.MAX_ATTEMPTS - 1
    assert all(2**number / 2 <= wait <= 2**number * 1.5 for number, wait in enumerate(waits))


@pytest.mark.parametrize(
    ("fault", "path", "message"),
    [
        (
            403,
            "manifest.json",
            r"data.root=http.*/dataset: no permission to read manifest.json \(403.*AWS_ACCESS_KEY_ID",
        ),
        (401, "manifest.json", "no permission to read manifest.json"),
        (404, "manifest.json", "no manifest.json found"),
        ("no ranges", "manifest.json", "sends complete files instead of byte ranges"),
        (403, "index.parquet", r"no permission to read index.parquet \(403"),
        (403, "train-000001.tar", r"no permission to read train-000001.tar \(403"),
        (404, "train-000001.tar", "train-000001.tar: no file"),
    ],
)
def test_requests_are_not_repeated_after_permanent_errors(
    site: Web, tmp_path: Path, fault: int | str, path: str, message: str
):
    site.fails = lambda requested, attempt: fault if requested == path else ""
    with pytest.raises(UserError, match=message):
        open_remote(site.url, tmp_path).split("train")
    assert len(set(site.requests)) == len(site.requests)


def test_sample_whose_permission_was_revoked_is_corrupt_after_one_request(site: Web, address: str, tmp_path: Path):
    reader = ShardReader(open_remote(address, tmp_path).split("train"))
    site.fails = lambda path, attempt: 403
    site.requests.clear()
    with pytest.raises(CorruptSampleError, match=r"no permission to read train-000000.tar \("):
        reader.read(0)
    assert len(site.requests) == 1


def test_unreachable_store_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for url in ("s3://clips/dataset", "http://127.0.0.1:9/dataset"):
        with pytest.raises(UserError, match=rf"data.root={url}: manifest.json cannot be read \(.*connect.*network"):
            open_remote(url, tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no permission to read .*\(Unable to locate credentials\).*AWS_ACCESS_KEY_ID"):
        open_remote("s3://clips/dataset", tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///dataset",
        "local:///dataset",
        "pipe://curl",
        "simplecache::s3://clips/dataset",
        "s3://clips/dataset::zip://a",
        "ftp://a/b",
        "github://org:repo@main/dataset",
        "s3:///dataset",
        "https://me:secret@host/dataset",
        "https://host/dataset?key=secret",
    ],
)
def test_unsupported_urls_are_rejected_without_revealing_credentials(url: str):
    with pytest.raises(UserError, match="data.root=.*allowed:") as error:
        ShardedDataset.open(url)
    assert "secret" not in str(error.value)


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"package gcsfs is not installed; run pip install 'distav\[remote\]'"):
        ShardedDataset.open("gs://clips/dataset")


def test_corrupt_cached_range_is_downloaded_again(site: Web, tmp_path: Path):
    reader = ShardReader(open_remote(site.url, tmp_path).split("train"))
    members = reader.read(3)
    (cached,) = (tmp_path / "cache").rglob("train-000000.tar/*")
    for damaged in (cached.read_bytes()[:-1], bytes(cached.stat().st_size), b""):
        cached.write_bytes(damaged)
        site.requests.clear()
        assert reader.read(3) == members and len(site.requests) == 1
        assert reader.read(3) == members and len(site.requests) == 1
    ShardReader(open_remote(site.url, tmp_path, 0).split("train")).read(3)
    assert site.requests[-1][1] == "train-000000.tar" and site.requests[-1][2].startswith("bytes=")
    offset, size = (int(reader.split.columns[f"video_{column}"][3]) for column in ("offset", "bytes"))
    overwrite(site.folder / "train-000000.tar", offset + size // 2, b"\x00\xff")
    cached.unlink()
    site.requests.clear()
    with pytest.raises(CorruptSampleError, match="video altered in train-000000.tar: CRC-32 differs"):
        reader.read(3)
    assert len(site.requests) == 2


def test_members_that_are_far_apart_are_not_downloaded(site: Web, tmp_path: Path):
    split = open_remote(site.url, tmp_path).split("train")
    split.columns["audio_offset"] = split.columns["audio_offset"] + (1 << 30)
    site.requests.clear()
    with pytest.raises(CorruptSampleError, match="outside train-000000.tar, or too far apart"):
        ShardReader(split).read(0)
    assert not site.requests


def test_reading_continues_if_the_cache_cannot_be_written(
    site: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    split = open_remote(site.url, tmp_path).split("train")
    shutil.rmtree(tmp_path / "cache" / "parts")
    (tmp_path / "cache" / "parts").write_text("not a directory")
    monkeypatch.setattr("distav.data.storage.cache._PAUSE_S", 0.0)
    reader = ShardReader(split)
    assert reader.read(0) and reader.read(1) and reader.read(0)
    assert len([message for message in caplog.messages if "caching is paused" in message]) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache=.*set it to a writable directory"):
        ShardedDataset.open(site.url, str(tmp_path / "file")).split("train")


def test_part_of_a_dataset_larger_than_the_limit_stays_cached(tmp_path: Path):
    cache = Cache(tmp_path, "dataset", 10_000)
    hits = []
    for epoch in range(3):
        hits.append(0)
        for number in np.random.default_rng(epoch).permutation(20):
            if cache.get(f"shard/{number}") is None:
                cache.put(f"shard/{number}", bytes(1000))
            else:
                hits[-1] += 1
            assert bytes_in(tmp_path / "dataset") <= 10_000
    assert hits == [0, 10, 10]


def test_least_recently_used_files_of_other_datasets_are_evicted_first(tmp_path: Path):
    other = Cache(tmp_path, "other", 10_000)
    for number in range(10):
        other.put(f"shard/{number}", bytes(1000))
        os.utime(tmp_path / "other" / "shard" / str(number), (number, number))
    assert other.get("shard/0") is not None  # Used again.
    cache = Cache(tmp_path, "dataset", 10_000)
    cache.put("shard/0", bytes(1000))
    remaining = {int(path.name) for path in (tmp_path / "other" / "shard").iterdir()}
    assert remaining == {0, 3, 4, 5, 6, 7, 8, 9} and cache.get("shard/0")
    # A smaller limit takes effect with the next write, for the dataset's own files too.
    for number in range(1, 9):
        cache.put(f"shard/{number}", bytes(1000))
    Cache(tmp_path, "dataset", 3000).put("shard/100", bytes(10))
    assert bytes_in(tmp_path / "dataset") <= 3000 and not bytes_in(tmp_path / "other")
    cache = Cache(tmp_path, "dataset", 100)
    cache.put("shard/200", bytes(101))
    assert cache.get("shard/200") is None


def test_processes_share_a_directory_and_its_limit(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=use_cache, args=(tmp_path, name, 40_000, seed))
                 for seed, name in enumerate(("one", "one", "two"))]  # fmt: skip
    for process in processes:
        process.start()
    recorded = [0]
    while any(process.is_alive() for process in processes):
        if (tmp_path / "used").exists():
            recorded.append(int((tmp_path / "used").read_text() or 0))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 20_000 < bytes_in(tmp_path / "one") + bytes_in(tmp_path / "two") <= max(recorded) <= 40_000
    assert not bytes_in(tmp_path / "parts")


def test_concurrent_writers_take_turns_to_update_the_total(tmp_path: Path):
    cache = Cache(tmp_path, "dataset", 10_000)
    cache.put("first", bytes(10))
    with open(tmp_path / "used") as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        thread = threading.Thread(target=cache.put, args=("second", bytes(10)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and cache.get("second") is None
        fcntl.flock(used, fcntl.LOCK_UN)
        thread.join()
    assert cache.get("second") == bytes(10) and int((tmp_path / "used").read_text()) == 20


def test_samples_of_a_batch_are_read_concurrently(site: Web, tmp_path: Path):
    loader = Loader(open_remote(site.url, tmp_path).split("train"), DATA, None, 0, 8, torch.device("cpu"))
    barrier = threading.Barrier(8, timeout=20)
    original = loader.reader.read

    def read(sample: int, prefetcher: PartPrefetcher | None = None):
        barrier.wait()  # Times out if samples are read one after another.
        return original(sample, prefetcher)

    loader.reader.read = read  # type: ignore[method-assign]
    assert loader.load(np.arange(8), 0).valid.all()
    loader.close()


def test_config_accepts_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for url in ("s3://clips/a-b/dataset_1", "https://host.org:8080/a/dataset"):
        assert loading.load(tiny_config(tmp_path), [f"data.root={url}"]).data.root == url
    with pytest.raises(UserError, match="data.cache_mib=-1: allowed: 0 or more"):
        loading.load(tiny_config(tmp_path), ["data.cache_mib=-1"])
    render_missing_dataset(DataConfig(root="s3://clips/dataset", synthetic=SyntheticConfig(enabled=True)), None)  # type: ignore[arg-type]
    assert not (tmp_path / "s3:").exists()
