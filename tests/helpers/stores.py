"""Stores on this machine: an S3 server, and a web server that fails as it is told to."""

import contextlib
import http.server
import os
import random
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distav.data.storage.cache import Cache

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
"""Environment variables, besides AWS_ENDPOINT_URL."""


class Bucket:
    """A bucket of an S3 server of its own."""

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
        """Copy a folder's files there; returns their URL."""
        for path in folder.iterdir():
            self.client.put_object(Bucket="clips", Key=f"{name}/{path.name}", Body=path.read_bytes())
        return f"s3://clips/{name}"


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    """Run an S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Bucket(f"http://{host}:{port}")
    finally:
        server.stop()


class Web(http.server.ThreadingHTTPServer):
    """A web server of the files of one folder.

    Attributes:
        asked: method, path and Range of every request so far.
        fails: what goes wrong, by path and how often it was asked for before with the same range: an HTTP status, or
            "reset" (the connection breaks before the answer), "short" (inside it), "whole" (no byte ranges), "".
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.asked = folder, list[tuple[str, str, str]]()
        self.fails: Callable[[str, int], int | str] = lambda path, before: ""
        self.url = f"http://127.0.0.1:{self.server_port}/set"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that were broken on purpose."""


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *arguments: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = urllib.parse.unquote(self.path).removeprefix("/set/")
        request = (self.command, name, self.headers.get("Range", ""))
        before = self.server.asked.count(request)
        self.server.asked.append(request)
        fault, path = self.server.fails(name, before), self.server.folder / name
        if fault == "reset":
            self.connection.close()
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content, status = path.read_bytes(), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request[2])
        if found and fault != "whole":
            content, status = content[int(found[1]) : int(found[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if fault == "short" else content)


@contextlib.contextmanager
def web(folder: Path) -> Iterator[Web]:
    """Run a web server of a folder's files."""
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
    """Bytes of all files in a folder."""
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return sum(sizes)


def use(root: Path, name: str, most_bytes: int, seed: int) -> None:
    """Keep and read ranges as one of several processes does."""
    cache, chance = Cache(root, name, most_bytes), random.Random(seed)
    for _ in range(300):
        number = chance.randrange(60)
        kept = cache.get(f"shard/{number}")
        assert kept in (None, bytes([number]) * 1000)
        if kept is None:
            cache.put(f"shard/{number}", bytes([number]) * 1000)
    os._exit(0 if not cache._told else 1)
