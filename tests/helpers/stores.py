"""Local test servers: an S3 store, and a web server with injected failures."""

import contextlib
import fcntl
import http.server
import os
import random
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.read_ahead import read_ahead
from distav.data.pipeline.reader import Members, ShardReader
from distav.data.pipeline.sampler import PADDING
from distav.data.storage import parts
from distav.data.storage.cache import Cache
from distav.data.storage.prefetch import PartPrefetcher

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
"""Environment variables for the S3 server, except AWS_ENDPOINT_URL."""


class Bucket:
    """The bucket `clips` of an S3 server."""

    def __init__(self, endpoint: str):
        import boto3

        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket="clips")

    def put(self, folder: Path, name: str) -> str:
        """Upload the files of a directory; returns its URL."""
        for path in folder.iterdir():
            self.client.put_object(Bucket="clips", Key=f"{name}/{path.name}", Body=path.read_bytes())
        return f"s3://clips/{name}"


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    """Run an S3 server with one bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Bucket(f"http://{host}:{port}")
    finally:
        server.stop()


class Web(http.server.ThreadingHTTPServer):
    """A web server for the files of a directory.

    Attributes:
        requests: method, path and Range header of every request so far.
        authorizations: Authorization header of every request so far.
        clients: User-Agent header of every request so far.
        fails: fault to inject, by path and number of earlier requests with the same range: an HTTP status, "reset"
            (closes the connection before the response), "truncated" (closes it within the response), "no ranges"
            (ignores the Range header), or "" for none.
        largest_range: bytes of the largest range that is not refused with status 403.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.requests = folder, list[tuple[str, str, str]]()
        self.authorizations, self.clients = list[str](), list[str]()
        self.fails: Callable[[str, int], int | str] = lambda path, attempt: ""
        self.largest_range = 1 << 40
        self.url = f"http://127.0.0.1:{self.server_port}/dataset"

    def shard_requests(self) -> list[tuple[str, str]]:
        """Return path and Range header of all requests for the content of shards."""
        return [(path, bytes_) for method, path, bytes_ in self.requests if method == "GET" and path.endswith(".tar")]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that were closed on purpose."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *arguments: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = urllib.parse.unquote(self.path).removeprefix("/dataset/")
        request = (self.command, name, self.headers.get("Range", ""))
        attempt = self.server.requests.count(request)
        self.server.requests.append(request)
        self.server.authorizations.append(self.headers.get("Authorization", ""))
        self.server.clients.append(self.headers.get("User-Agent", ""))
        fault, path = self.server.fails(name, attempt), self.server.folder / name
        if fault == "reset":
            self.connection.close()
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content, status = path.read_bytes(), 200
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", request[2])
        if byte_range and int(byte_range[2]) - int(byte_range[1]) >= self.server.largest_range:
            self.send_error(403)
            return
        if byte_range and fault != "no ranges":
            first, last, size = int(byte_range[1]), min(int(byte_range[2]), len(content) - 1), len(content)
            content, status = content[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", '"dataset"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if fault == "truncated" else content)


@contextlib.contextmanager
def web(folder: Path) -> Iterator[Web]:
    """Run a web server for the files of a directory."""
    server = Web(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def bytes_in(folder: Path) -> int:
    """Total size of the files in a directory, in bytes."""
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return sum(sizes)


def cached_range_bytes(cache: Path) -> int:
    """Total size of the cached ranges and of those that are being written, in bytes; tables are not counted."""
    with open(cache / "used", "a") as used:
        fcntl.flock(used, fcntl.LOCK_EX)  # No file is added or removed meanwhile.
        return sum(bytes_in(folder) for folder in [*cache.glob("*/*.tar"), cache / "parts"])


def read_batches(
    split: Split, batches: Iterable[np.ndarray], block_shards: int = 64, after: Callable[[int], None] | None = None
) -> dict[int, Members]:
    """Read batches of ids as a loader does, and return the members by id.

    Args:
        split: the split.
        batches: ids of each batch.
        block_shards: shards that are shuffled together.
        after: called with the number of each batch when it has been read.
    """
    reader, samples = ShardReader(split), dict[int, Members]()

    def read(sample: int, prefetcher: PartPrefetcher | None) -> Members | None:
        return None if sample == PADDING else reader.read(sample, prefetcher)

    with ThreadPoolExecutor(8) as pool, contextlib.closing(reader):
        steps = read_ahead(((ids, 0) for ids in batches), reader, pool, read, 2, block_shards)
        for number, (ids, _, members) in enumerate(steps):
            samples |= {sample: found for sample, found in zip(ids.tolist(), members, strict=True) if found}
            if after:
                after(number)
    return samples


def read_in_process(url: str, cache: Path, part_bytes: int, seed: int) -> None:
    """Read the training split of a remote dataset in random order, as one of several processes."""
    parts.PART_BYTES = part_bytes
    split = ShardedDataset.open(url, str(cache), 64).split("train")
    samples = read_batches(split, np.array_split(np.random.default_rng(seed).permutation(len(split)), 12))
    os._exit(0 if len(samples) == len(split) else 1)


def use_cache(root: Path, name: str, max_bytes: int, seed: int) -> None:
    """Write and read random ranges, as one of several processes that share a cache; exits with 1 after a warning."""
    cache, rng = Cache(root, name, max_bytes), random.Random(seed)
    for _ in range(300):
        number = rng.randrange(60)
        cached = cache.get(f"shard/{number}")
        assert cached in (None, bytes([number]) * 1000)
        if cached is None:
            cache.put(f"shard/{number}", bytes([number]) * 1000)
    os._exit(1 if cache._warned else 0)
