"""Sets in object storage give what the local folder gives, through failures, and are kept on this machine."""

import fcntl
import json
import logging
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
from tests.helpers.launch import tiny_config
from tests.helpers.stores import CREDENTIALS, Bucket, Web, bucket, bytes_in, use, web
from tests.robustness.test_data import inspect, overwrite

DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)
MIB = 64


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def store() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


@pytest.fixture
def s3(store: Bucket, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The set in a bucket, under a name of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.environment["AWS_ENDPOINT_URL"])
    return store.put(tiny_shards, f"{request.node.name}/a b")


@pytest.fixture
def site(tiny_shards: Path, tmp_path: Path) -> Iterator[Web]:
    with web(Path(shutil.copytree(tiny_shards, tmp_path / "site"))) as found:
        yield found


def opened(url: str, tmp_path: Path, cache_mib: int = MIB) -> ShardedDataset:
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
    """Names of the objects that are asked for."""
    asked: list[str] = []
    whole = object_store.ObjectStore._range
    monkeypatch.setattr(
        object_store.ObjectStore,
        "_range",
        lambda self, name, *place: (asked.append(name), whole(self, name, *place))[1],
    )
    return asked


def test_batches_from_s3_are_those_of_the_folder_and_come_once(
    s3: str, tiny_shards: Path, tmp_path: Path, requests: list[str]
):
    local = ShardedDataset.open(tiny_shards)
    for epoch, asked in ((0, 96), (1, 0)):
        shards = opened(s3, tmp_path)
        requests.clear()
        for here, there in zip(batches(local, epoch), batches(shards, epoch), strict=True):
            assert torch.equal(here.ids, there.ids) and there.valid.all() and torch.equal(here.seeds, there.seeds)
            assert all(torch.equal(fed, there.media[name]) for name, fed in here.media.items())
        assert len(requests) == asked  # A request a sample, and in the next epoch none.
    ours, theirs = (load_labels(each, each.split("train")) for each in (local, shards))
    assert np.array_equal(ours.given, theirs.given) and local.classes == shards.classes
    assert not list((tmp_path / "cache").rglob("*.tar/*.tar")) and shards.location == s3


def test_a_child_reads_what_its_parent_opened(s3: str, tmp_path: Path):
    split = opened(s3, tmp_path, 0).split("train")
    expected = ShardReader(split).read(3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if ShardReader(split).read(3) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_set_made_anew_at_the_same_url_is_read_anew(store: Bucket, s3: str, tiny_shards: Path, tmp_path: Path):
    first = opened(s3, tmp_path).split("train")
    ShardReader(first).read(0)
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].pop()
    key = s3.removeprefix("s3://clips/")
    store.client.put_object(Bucket="clips", Key=f"{key}/manifest.json", Body=json.dumps(manifest).encode())
    store.client.put_object(Bucket="clips", Key=f"{key}/labels.parquet", Body=b"other")
    shards = opened(s3, tmp_path)
    assert len(shards.split("train").shards) == len(first.shards) - 1
    with pytest.raises(UserError, match=r"s3://clips/.*labels.parquet has 5 bytes"):
        shards.table("labels.parquet", "train")


def test_what_is_wrong_in_a_bucket_is_told(store: Bucket, s3: str, tiny_shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"data.root=s3://none/set: no manifest.json there .*make_shards"):
        opened("s3://none/set", tmp_path)
    with pytest.raises(UserError, match=r"no manifest.json there"):
        opened("s3://clips/none", tmp_path)
    place = {"Bucket": "clips", "Key": f"{s3.removeprefix('s3://clips/')}/train-000001.tar"}
    store.client.put_object(**place, Body=b"cut")
    with pytest.raises(UserError, match=r"s3://clips/.*/train-000001.tar: 3 bytes, expected \d+"):
        opened(s3, tmp_path).split("train")
    store.client.delete_object(**place)
    with pytest.raises(UserError, match=r"train-000001.tar: no file, expected \d+"):
        opened(s3, tmp_path).split("train")
    opened(s3, tmp_path).split("test")


def test_verify_reads_a_url(store: Bucket, s3: str, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, said = inspect(s3)  # pyright: ignore[reportArgumentType]
    assert status == 0 and f"{s3}: every file" in said, said
    content = bytearray((tiny_shards / "train-000001.tar").read_bytes())
    content[700] ^= 1
    key = s3.removeprefix("s3://clips/")
    store.client.put_object(Bucket="clips", Key=f"{key}/train-000001.tar", Body=bytes(content))
    store.client.put_object(Bucket="clips", Key=f"{key}/train-000009.tar", Body=b"")
    store.client.delete_object(Bucket="clips", Key=f"{key}/test-000000.idx")
    status, said = inspect(s3)  # pyright: ignore[reportArgumentType]
    assert status == 2 and "3 faults" in said, said
    assert f"{s3}/train-000001.tar: 'train-000000040': video altered" in said
    assert f"{s3}/train-000009.tar: manifest.json does not name this shard" in said
    assert f"{s3}/test-000000.idx: No such file" in said


FAILURES = {
    "throttled": lambda path, before: 503 if before < 3 else "",
    "too many": lambda path, before: 429 if before < 2 else "",
    "reset": lambda path, before: "reset" if before < 3 else "",
    "cut short": lambda path, before: "short" if before < 3 else "",
    "all of it": lambda path, before: [500, "reset", "short", 408, 502, ""][before % 6],
}  # fmt: skip


@pytest.fixture(params=["http", "s3"])
def address(site: Web, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The site as a web server, and as an S3 store that lists nothing."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{site.server_port}")
    return {"http": site.url, "s3": "s3://set"}[request.param]


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_that_pass_leave_no_trace(site: Web, address: str, tiny_shards: Path, tmp_path: Path, failure: str):
    site.fails = FAILURES[failure]
    shards, local = opened(address, tmp_path), ShardedDataset.open(tiny_shards)
    reader, here = (ShardReader(each.split("train")) for each in (shards, local))
    assert [reader.read(sample) for sample in (0, 41, 95)] == [here.read(sample) for sample in (0, 41, 95)]
    assert len(set(site.asked)) < len(site.asked)


@pytest.mark.parametrize("fault", [503, "short"])
def test_tries_end_and_cost_the_samples_of_that_shard_alone(
    site: Web, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str
):
    waits: list[float] = []
    split = opened(address, tmp_path).split("train")
    site.fails = lambda path, before: fault if path == "train-000001.tar" else ""
    site.asked.clear()
    loader = Loader(split, DATA, None, 0, 3, torch.device("cpu"))
    monkeypatch.setattr(object_store.time, "sleep", waits.append)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 1.0)
    batch = loader.load(np.array([0, 41, 95]), 0)
    loader.close()
    assert batch.valid.tolist() == [True, False, True]
    assert "train-000001.tar cannot be read (" in loader.quarantine.reasons[41]
    tries = [request for request in site.asked if request[1] == "train-000001.tar"]
    assert len(tries) == object_store.MAX_ATTEMPTS and len(waits) == object_store.MAX_ATTEMPTS - 1
    assert all(2**number / 2 <= wait <= 2**number * 1.5 for number, wait in enumerate(waits))


@pytest.mark.parametrize(
    ("fault", "path", "told"),
    [
        (403, "manifest.json", r"data.root=http.*/set: manifest.json may not be read \(403.*AWS_ACCESS_KEY_ID"),
        (401, "manifest.json", "may not be read"),
        (404, "manifest.json", "no manifest.json there"),
        ("whole", "manifest.json", "sends whole files, and no byte ranges"),
        (403, "index.parquet", r"index.parquet may not be read \(403"),
        (403, "train-000001.tar", r"train-000001.tar may not be read \(403"),
        (404, "train-000001.tar", "train-000001.tar: no file"),
    ],
)
def test_what_will_not_pass_is_asked_for_once(site: Web, tmp_path: Path, fault: int | str, path: str, told: str):
    site.fails = lambda asked, before: fault if asked == path else ""
    with pytest.raises(UserError, match=told):
        opened(site.url, tmp_path).split("train")
    assert len(set(site.asked)) == len(site.asked)


def test_an_object_that_may_not_be_read_any_more_is_a_bad_sample_max_parallel(site: Web, address: str, tmp_path: Path):
    reader = ShardReader(opened(address, tmp_path).split("train"))
    site.fails = lambda path, before: 403
    site.asked.clear()
    with pytest.raises(CorruptSampleError, match=r"train-000000.tar may not be read \("):
        reader.read(0)
    assert len(site.asked) == 1


def test_a_store_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for url in ("s3://clips/set", "http://127.0.0.1:9/set"):
        with pytest.raises(UserError, match=rf"data.root={url}: manifest.json cannot be read \(.*connect.*network"):
            opened(url, tmp_path)
    for name in [each for each in os.environ if each.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"may not be read \(Unable to locate credentials\).*AWS_ACCESS_KEY_ID"):
        opened("s3://clips/set", tmp_path)


@pytest.mark.parametrize(
    "url",
    ["file:///set", "local:///set", "pipe://curl", "simplecache::s3://clips/set", "s3://clips/set::zip://a", "ftp://a/b",
     "github://org:repo@main/set", "s3:///set", "https://me:secret@host/set", "https://host/set?key=secret"],
)  # fmt: skip
def test_other_urls_are_refused(url: str):
    with pytest.raises(UserError, match="data.root=.*allowed:") as told:
        ShardedDataset.open(url)
    assert "secret" not in str(told.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"the package gcsfs is missing; pip install 'distav\[remote\]'"):
        ShardedDataset.open("gs://clips/set")


def test_what_is_kept_and_damaged_is_fetched_again(site: Web, tmp_path: Path):
    reader = ShardReader(opened(site.url, tmp_path).split("train"))
    whole = reader.read(3)
    (kept,) = (tmp_path / "cache").rglob("train-000000.tar/*")
    for damaged in (kept.read_bytes()[:-1], bytes(kept.stat().st_size), b""):
        kept.write_bytes(damaged)
        site.asked.clear()
        assert reader.read(3) == whole and len(site.asked) == 1
        assert reader.read(3) == whole and len(site.asked) == 1
    ShardReader(opened(site.url, tmp_path, 0).split("train")).read(3)
    assert site.asked[-1][1] == "train-000000.tar" and site.asked[-1][2].startswith("bytes=")
    offset, size = (int(reader.split.columns[f"video_{each}"][3]) for each in ("offset", "bytes"))
    overwrite(site.folder / "train-000000.tar", offset + size // 2, b"\x00\xff")
    kept.unlink()
    site.asked.clear()
    with pytest.raises(CorruptSampleError, match="video altered in train-000000.tar: CRC-32 differs"):
        reader.read(3)
    assert len(site.asked) == 2


def test_members_that_do_not_lie_together_are_not_fetched(site: Web, tmp_path: Path):
    split = opened(site.url, tmp_path).split("train")
    split.columns["audio_offset"] = split.columns["audio_offset"] + (1 << 30)
    site.asked.clear()
    with pytest.raises(CorruptSampleError, match="do not lie together"):
        ShardReader(split).read(0)
    assert not site.asked


def test_reading_goes_on_where_nothing_can_be_kept(
    site: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    split = opened(site.url, tmp_path).split("train")
    shutil.rmtree(tmp_path / "cache" / "parts")
    (tmp_path / "cache" / "parts").write_text("in the way")
    monkeypatch.setattr("distav.data.storage.cache._PAUSE_S", 0.0)
    monkeypatch.setattr(logging.getLogger("distav"), "propagate", True)
    reader = ShardReader(split)
    assert reader.read(0) and reader.read(1) and reader.read(0)
    assert len([each for each in caplog.messages if "nothing is kept there" in each]) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache=.*name a folder"):
        ShardedDataset.open(site.url, str(tmp_path / "file")).split("train")


def test_a_set_larger_than_the_bound_is_kept_in_part(tmp_path: Path):
    cache = Cache(tmp_path, "set", 10_000)
    hits = []
    for epoch in range(3):
        hits.append(0)
        for number in np.random.default_rng(epoch).permutation(20):
            if cache.get(f"shard/{number}") is None:
                cache.put(f"shard/{number}", bytes(1000))
            else:
                hits[-1] += 1
            assert bytes_in(tmp_path / "set") <= 10_000
    assert hits == [0, 10, 10]


def test_least_recently_used_files_of_other_sets_go_first(tmp_path: Path):
    other = Cache(tmp_path, "other", 10_000)
    for number in range(10):
        other.put(f"shard/{number}", bytes(1000))
        os.utime(tmp_path / "other" / "shard" / str(number), (number, number))
    assert other.get("shard/0") is not None  # Used again.
    cache = Cache(tmp_path, "set", 10_000)
    cache.put("shard/0", bytes(1000))
    left = {int(path.name) for path in (tmp_path / "other" / "shard").iterdir()}
    assert left == {0, 3, 4, 5, 6, 7, 8, 9} and cache.get("shard/0")
    # A smaller bound holds at the next chance, for the set's own files too.
    for number in range(1, 9):
        cache.put(f"shard/{number}", bytes(1000))
    Cache(tmp_path, "set", 3000).put("shard/100", bytes(10))
    assert bytes_in(tmp_path / "set") <= 3000 and not bytes_in(tmp_path / "other")
    cache = Cache(tmp_path, "set", 100)
    cache.put("shard/200", bytes(101))
    assert cache.get("shard/200") is None


def test_processes_share_a_folder_and_its_bound(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=use, args=(tmp_path, name, 40_000, seed))
                 for seed, name in enumerate(("one", "one", "two"))]  # fmt: skip
    for each in processes:
        each.start()
    noted = [0]
    while any(each.is_alive() for each in processes):
        if (tmp_path / "used").exists():
            noted.append(int((tmp_path / "used").read_text() or 0))
    for each in processes:
        each.join()
    assert [each.exitcode for each in processes] == [0, 0, 0]
    assert 20_000 < bytes_in(tmp_path / "one") + bytes_in(tmp_path / "two") <= max(noted) <= 40_000
    assert not bytes_in(tmp_path / "parts")


def test_a_process_waits_for_another_to_note_its_bytes(tmp_path: Path):
    cache = Cache(tmp_path, "set", 10_000)
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


def test_samples_of_a_batch_are_read_at_a_time(site: Web, tmp_path: Path):
    loader = Loader(opened(site.url, tmp_path).split("train"), DATA, None, 0, 8, torch.device("cpu"))
    together = threading.Barrier(8, timeout=20)
    whole = loader.reader.read

    def read(sample: int):
        together.wait()  # Breaks where they come one after another.
        return whole(sample)

    loader.reader.read = read  # type: ignore[method-assign]
    assert loader.load(np.arange(8), 0).valid.all()
    loader.close()


def test_settings_take_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for url in ("s3://clips/a-b/set_1", "https://host.org:8080/a/set"):
        assert loading.load(tiny_config(tmp_path), [f"data.root={url}"]).data.root == url
    with pytest.raises(UserError, match="data.cache_mib=-1 is not possible; allowed: 0 or more"):
        loading.load(tiny_config(tmp_path), ["data.cache_mib=-1"])
    render_missing_dataset(DataConfig(root="s3://clips/set", synthetic=SyntheticConfig(enabled=True)), None)  # type: ignore[arg-type]
    assert not (tmp_path / "s3:").exists()
