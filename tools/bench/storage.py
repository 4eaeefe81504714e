"""Reading a dataset from an object store in random order: shard-sized ranges, compared with one request per sample.

The store is a process on the same machine that delays each response. Samples are read and verified as training reads
them, into an empty cache, by s3fs and by obstore.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from distav.config.schema import DataConfig
from distav.data.dataset import Split
from distav.data.integrity import MANIFEST
from distav.data.pipeline.read_ahead import read_ahead
from distav.data.pipeline.reader import ShardReader
from distav.data.pipeline.sampler import permutation
from distav.data.storage import parts
from distav.data.storage.object_store import CONNECTIONS, ObjectStore
from distav.data.storage.obstore_client import ObstoreClient
from distav.distributed.environment import package_versions
from tools.bench.object_server import BUCKET, ObjectServer, serve
from tools.bench.shards import AUDIO_BYTES, VIDEO_BYTES, write_shards
from tools.bench.timing import Results, Setting

SHARD_SAMPLES = 200
BATCH = 32
DELAYS_MS = (0, 20, 50)
PER_SAMPLE, PER_PART = "one request per sample", "shard-sized ranges"
WAYS = (PER_SAMPLE, PER_PART)
CLIENTS = ("s3fs", "obstore")
_THRESHOLDS = {0: ">= 2", 20: ">= 2", 50: ">= 3"}
"""Thresholds of the speed-up by delay in ms."""
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


@dataclass
class _Epoch:
    """What one epoch took.

    Attributes:
        wall_s: wall time in seconds.
        cpu_s: CPU time of the reading process in seconds.
        first_batch_s: wall time until the first batch was read.
        requests: number of requests to the store.
        content_bytes: bytes of content that the store sent.
    """

    wall_s: float
    cpu_s: float
    first_batch_s: float
    requests: int
    content_bytes: int


def run(setting: Setting, samples: int) -> Results:
    """Measure an epoch with an empty cache for each delay, way of reading and client.

    Args:
        setting: rounds.
        samples: samples of the dataset, 360 kB each.
    """
    arguments = {"samples": samples, "sample_bytes": VIDEO_BYTES + AUDIO_BYTES, "shard_samples": SHARD_SAMPLES}
    arguments |= {"part_bytes": parts.PART_BYTES, "batch": BATCH, **package_versions(CLIENTS)}
    results = Results("storage", arguments)
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as directory:
        split = write_shards(Path(directory), samples, SHARD_SAMPLES)
        (Path(directory) / MANIFEST).write_text('{"benchmark": "storage"}\n')
        with serve(Path(directory)) as server, mock.patch.dict(os.environ, _environment(server)):
            for delay_ms in DELAYS_MS:
                server.set_delay(delay_ms / 1000)
                epochs = _measure(setting, split, server)
                for (way, client), measured in epochs.items():
                    _add_epochs(results, f"{delay_ms} ms, {way}, {client}", samples, measured)
                _add_ratios(results, delay_ms, epochs, sum(-(-size // parts.PART_BYTES) for size in _sizes(split)))
    return results


def _sizes(split: Split) -> list[int]:
    return [path.stat().st_size for path in split.shards]


def _environment(server: ObjectServer) -> dict[str, str]:
    return _CREDENTIALS | {"AWS_ENDPOINT_URL": server.endpoint}


def _measure(setting: Setting, split: Split, server: ObjectServer) -> dict[tuple[str, str], list[_Epoch]]:
    """Return the measured epochs by way of reading and client, which alternate; the first round is not counted."""
    epochs: dict[tuple[str, str], list[_Epoch]] = {(way, client): [] for way in WAYS for client in CLIENTS}
    for number in range(setting.rounds + 1):
        for (way, client), measured in epochs.items():
            with tempfile.TemporaryDirectory(prefix="distav-bench-cache-") as cache:
                with _client(client):
                    store = ObjectStore(f"s3://{BUCKET}", cache, 1 << 20)
                    epoch = _read_epoch(split, store, way, number, server)
            if number:
                measured.append(epoch)
    return epochs


def _client(name: str) -> AbstractContextManager[Any]:
    """Context in which byte ranges are read by one of the clients."""
    return mock.patch.object(ObstoreClient, "read_range", lambda *_: None) if name == "s3fs" else nullcontext()


def _read_epoch(split: Split, store: ObjectStore, way: str, number: int, server: ObjectServer) -> _Epoch:
    reader = ShardReader(replace(split, remote=store, shard_bytes=_sizes(split)))
    if way == PER_SAMPLE:
        reader.layout = None
    data = DataConfig()
    order = permutation(split.shard_sizes, 0, number, data.shuffle_block_shards)
    plan = [(ids, number) for ids in np.array_split(order, -(-len(order) // BATCH))]
    first_batch_s = 0.0
    server.take_counts()
    cpu, wall = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _, _, members in read_ahead(plan, reader, pool, reader.read, data.prefetch, data.shuffle_block_shards):
            for sample in members:
                assert sample is not None
            first_batch_s = first_batch_s or time.perf_counter() - wall
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return _Epoch(wall_s, cpu_s, first_batch_s, *server.take_counts())


def _add_epochs(results: Results, name: str, samples: int, epochs: Sequence[_Epoch]) -> None:
    results.add_times({name: [epoch.wall_s for epoch in epochs]}, {name: (samples, "samples/s")})
    results.figures[name] |= {
        "requests": statistics.median(epoch.requests for epoch in epochs),
        "content_bytes": statistics.median(epoch.content_bytes for epoch in epochs),
        "cpu_s": statistics.median(epoch.cpu_s for epoch in epochs),
        "first_batch_s": statistics.median(epoch.first_batch_s for epoch in epochs),
    }


def _add_ratios(results: Results, delay_ms: int, epochs: dict[tuple[str, str], list[_Epoch]], num_parts: int) -> None:
    wall = {key: [epoch.wall_s for epoch in measured] for key, measured in epochs.items()}
    cpu = {key: [epoch.cpu_s for epoch in measured] for key, measured in epochs.items()}
    before, after = wall[PER_SAMPLE, "s3fs"], wall[PER_PART, "obstore"]
    name = f"{delay_ms} ms, samples/s, {PER_PART} by obstore / {PER_SAMPLE} by s3fs"
    results.add_ratio(name, (before, after), _THRESHOLDS[delay_ms])
    requests = max(epoch.requests for client in CLIENTS for epoch in epochs[PER_PART, client])
    results.add_ratio(f"{delay_ms} ms, requests / parts of the shards", requests / num_parts, "<= 1")
    for client in CLIENTS:
        name = f"{delay_ms} ms, {client}, samples/s, {PER_PART} / {PER_SAMPLE}"
        results.add_ratio(name, (wall[PER_SAMPLE, client], wall[PER_PART, client]))
    for way in WAYS:
        results.add_ratio(f"{delay_ms} ms, {way}, samples/s, obstore / s3fs", (wall[way, "s3fs"], wall[way, "obstore"]))
        results.add_ratio(f"{delay_ms} ms, {way}, CPU time, obstore / s3fs", (cpu[way, "obstore"], cpu[way, "s3fs"]))


def table(stored: dict[str, Any]) -> str:
    """Return the figures of all epochs as a Markdown table."""
    lines = [
        "| delay | reading | client | samples/s | requests | content | CPU time | first batch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figure in stored["figures"].items():
        delay, way, client = name.split(", ")
        values = [
            f"{figure['rate']:,.0f}",
            f"{figure['requests']:,.0f}",
            f"{figure['content_bytes'] / 1e6:,.0f} MB",
            f"{figure['cpu_s']:.2f} s",
            f"{figure['first_batch_s']:.2f} s",
        ]
        lines.append(f"| {' | '.join([delay, way, client, *values])} |")
    return "\n".join(lines)
