"""A local object store in a process of its own: the files of a directory, with a delay before each response.

It answers GET and HEAD of `http://127.0.0.1:PORT/BUCKET/NAME`, which clients of S3 and of web servers send. Signatures
are ignored, and there are no listings.
"""

import asyncio
import contextlib
import ctypes
import multiprocessing
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "clips"
_START_S = 60.0


class ObjectServer:
    """The running server.

    Attributes:
        endpoint: its URL.
    """

    def __init__(self, port: int, delay: Any, counts: Any):
        self.endpoint = f"http://127.0.0.1:{port}"
        self._delay, self._counts = delay, counts

    def set_delay(self, seconds: float) -> None:
        """Set the delay of each response in seconds."""
        self._delay.value = seconds

    def take_counts(self) -> tuple[int, int]:
        """Return the number of requests and the bytes of content since the last call."""
        counts = self._counts[0], self._counts[1]
        self._counts[0] = self._counts[1] = 0
        return counts


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[ObjectServer]:
    """Run a server for the files of a directory."""
    context = multiprocessing.get_context("spawn")
    delay, counts = context.Value(ctypes.c_double, 0.0), context.Array(ctypes.c_int64, 2)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(str(folder), delay, counts, sender), daemon=True)
    process.start()
    try:
        if not receiver.poll(_START_S):
            raise RuntimeError("the local object store did not start")
        yield ObjectServer(receiver.recv(), delay, counts)
    finally:
        process.terminate()
        process.join()


def _run(folder: str, delay: Any, counts: Any, sender: Any) -> None:
    async def main() -> None:
        async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await _respond(await reader.readuntil(b"\r\n\r\n"), writer, Path(folder), delay, counts)
            writer.close()

        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        sender.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def _respond(request: bytes, writer: asyncio.StreamWriter, folder: Path, delay: Any, counts: Any) -> None:
    method, target = request.decode("latin1").split(" ", 2)[:2]
    byte_range = re.search(rb"\r\nrange: *bytes=(\d+)-(\d+)\r\n", request, re.IGNORECASE)
    path = folder / urllib.parse.unquote(target.partition("?")[0]).removeprefix(f"/{BUCKET}/")
    if delay.value:
        await asyncio.sleep(delay.value)
    counts[0] += 1
    if not path.is_file():
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    size = path.stat().st_size
    start, end, status = 0, size, "200 OK"
    headers = ["Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT", f'ETag: "{size}"', "Accept-Ranges: bytes"]
    if byte_range:
        start, end, status = int(byte_range[1]), min(size, int(byte_range[2]) + 1), "206 Partial Content"
        headers.append(f"Content-Range: bytes {start}-{end - 1}/{size}")
    head = [f"HTTP/1.1 {status}", f"Content-Length: {end - start}", *headers]
    writer.write("\r\n".join([*head, "", ""]).encode())
    await writer.drain()
    if method == "GET":
        with open(path, "rb") as file:
            await asyncio.get_running_loop().sendfile(writer.transport, file, start, end - start)
        counts[1] += end - start
