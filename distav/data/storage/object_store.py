"""Datasets in object stores and on web servers, through fsspec and obstore, with retries and a local cache.

fsspec, its file systems and obstore come with `pip install 'distav[remote]'`; they are imported when a URL is opened.
"""

import contextlib
import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distav.config.errors import UserError, format_list
from distav.data.integrity import MANIFEST, CorruptFileError, verify_file
from distav.data.storage.cache import Cache, default_cache_dir
from distav.data.storage.errors import (
    CREDENTIALS_HELP,
    ObjectNotFoundError,
    StorageError,
    classify_error,
    is_permanent,
    storage_error,
)
from distav.data.storage.obstore_client import ObstoreClient

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
"""Supported URL protocols, and the package that reads each."""
CONNECTIONS = 16
"""Concurrent requests of a process for samples."""
MAX_ATTEMPTS = 6
RETRY_WAIT_S = 0.5
"""Wait before the second attempt; it doubles from attempt to attempt, with a random factor of 0.5 to 1.5."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 30
"""Limits for opening a connection and for the next bytes of a response."""
T = TypeVar("T")


def is_url(root: str | Path) -> bool:
    """Return whether a dataset location is a URL instead of a directory."""
    return "://" in str(root)


class RemoteDirectory:
    """Files in an object store or on a web server.

    Attributes:
        url: their directory.
        setting: setting that errors name.
        protocols: supported URL protocols.
    """

    setting = "data.root"
    protocols: Sequence[str] = tuple(PACKAGES)

    def __init__(self, url: str):
        """Verify the URL, without a request.

        Raises:
            UserError: for an unsupported URL.
        """
        self.url = _check_url(url, self.setting, self.protocols)
        self._systems: dict[int, Any] = {}
        self._obstore = ObstoreClient(self.url, (CONNECT_TIMEOUT_S, READ_TIMEOUT_S))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            StorageError: if the store does not report it.
        """
        return self._with_retries(name, lambda system: system.info(self._address(name)))["size"]

    def download(self, name: str, path: Path) -> None:
        """Copy an object to a file.

        Raises:
            StorageError: if it cannot be read.
        """
        self._with_retries(name, lambda system: system.get_file(self._address(name), str(path)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return a byte range of a file.

        Raises:
            StorageError: if it cannot be read after all attempts.
        """
        if size == 0:
            return b""

        def request(system: Any) -> bytes:
            content = self._obstore.read_range(name, offset, size)
            if content is None:
                content = system.cat_file(self._address(name), start=offset, end=offset + size)
            if len(content) < size:
                raise OSError(f"received {len(content)} of {size} bytes")
            return content

        content = self._with_retries(name, request)
        if len(content) > size:
            raise StorageError(
                self.url,
                "the server sends complete files instead of byte ranges",
                "Use a server that supports range requests.",
            )
        return content

    def _with_retries(self, name: str, request: Callable[[Any], T]) -> T:
        """Return the result of a request; repeat it with increasing waits after temporary errors."""
        waits = [RETRY_WAIT_S * 2**number for number in range(MAX_ATTEMPTS - 1)]
        while True:
            try:
                return request(self._system)
            except Exception as error:  # noqa: BLE001  # Every store has exceptions of its own.
                status, detail = classify_error(error)
                if is_permanent(status) or not waits:
                    raise self._error(name, status, detail) from None
                # The jitter must not advance a random number generator that training uses.
                time.sleep(waits.pop(0) * random.SystemRandom().uniform(0.5, 1.5))

    def _error(self, name: str, status: int, detail: str) -> StorageError:
        return storage_error(self.url, name, status, detail)

    def _address(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def _system(self) -> Any:
        """The file system of this process; connections do not survive a fork."""
        process = os.getpid()
        if process not in self._systems:
            self._systems[process] = _open_file_system(self.url, self.setting)
        return self._systems[process]


class ObjectStore(RemoteDirectory):
    """A dataset in an object store or on a web server.

    Attributes:
        url: location of the dataset.
        manifest: content of its manifest.json.
        cache: local cache of byte ranges.
        folder: local directory that mirrors its tables; it depends on the manifest, so that a new version of the
            dataset at the same URL never uses tables of an older one.
    """

    def __init__(self, url: str, cache: str = "", cache_mib: int = 0):
        """Read the manifest and verify that the server supports byte ranges.

        Args:
            url: directory of the dataset, e.g. `s3://bucket/dataset`.
            cache: cache directory, shared by any number of datasets; empty: the user's cache directory.
            cache_mib: size limit of the cache in MiB; 0: cache tables only.

        Raises:
            UserError: for an unsupported URL, a package that is not installed, or a store that cannot be read.
        """
        super().__init__(url)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, MANIFEST)
            self.download(MANIFEST, path)
            self.manifest = path.read_bytes()
        if len(self.manifest) > 1:
            self.read_range(MANIFEST, 1, 1)
        name = hashlib.sha256(f"{self.url}\n".encode() + self.manifest).hexdigest()[:32]
        root = Path(cache).expanduser() if cache else default_cache_dir()
        self.cache = Cache(root.absolute(), name, cache_mib << 20)
        self.folder = self.cache.folder

    def read(self, name: str, offset: int, size: int, bypass_cache: bool = False) -> bytes:
        """Return a byte range of an object, from the cache or from the store.

        Args:
            name: the object.
            offset, size: the byte range.
            bypass_cache: read from the store and replace the cached bytes, because they are corrupt.

        Raises:
            StorageError: if the range cannot be read after all attempts.
        """
        cache_key = f"{name}/{offset}-{size}"
        if bypass_cache:
            self.cache.drop(cache_key)
        cached = self.cache.get(cache_key)
        if cached is not None and len(cached) == size:
            return cached
        content = self.read_range(name, offset, size)
        self.cache.put(cache_key, content)
        return content

    def mirror(self, name: str, expected: dict[str, Any] | None) -> None:
        """Download a table into `folder` unless it exists there; only one of several processes downloads it.

        Args:
            name: the table.
            expected: its size and SHA-256; None if the manifest does not list it.

        Raises:
            UserError: if it cannot be read, or if the cache directory cannot be written.
            CorruptFileError: if the table in the store differs from the manifest.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with contextlib.suppress(CorruptFileError):
                    if expected:
                        return verify_file(self.folder, name, expected)
                with self.cache.writing(name) as part:
                    self.download(name, part)
        except OSError as error:
            raise UserError(
                f"data.cache={self.cache.root}: {error.strerror or error}; set it to a writable directory on a local "
                "disk."
            ) from None
        if expected:
            verify_file(self.folder, name, expected)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Return the sizes of objects in bytes by name, None for missing ones; uses one listing if possible.

        Raises:
            StorageError: if the store does not report them.
        """
        names = list(names)
        if self.listing is not None:
            return {name: self.listing.get(name) for name in names}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    @cached_property
    def listing(self) -> dict[str, int] | None:
        """Sizes of all objects of the dataset in bytes by name; None if the store does not support or allow listing."""
        if self.url.startswith("http"):
            return None
        try:
            entries = self._with_retries("", lambda system: system.ls(self.url, detail=True))
        except StorageError:
            return None
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def _size(self, name: str) -> int | None:
        try:
            return self.size(name)
        except ObjectNotFoundError:
            return None


def _check_url(url: str, setting: str, protocols: Sequence[str]) -> str:
    """Return a URL without trailing slashes; raise a UserError if it is not supported."""
    protocol, parts = url.partition("://")[0], urlsplit(url)
    if protocol not in protocols:
        raise UserError(f"{setting}={url}: allowed: a directory, or a URL with {format_list(protocols)}.")
    if not parts.netloc or set("?#@") & set(url) or "::" in url:
        raise UserError(
            f"{setting}={protocol}://...: allowed: {protocol}://bucket/directory, without a query, chained protocols "
            f"(::) or credentials. {CREDENTIALS_HELP}"
        )
    return url.rstrip("/")


def _open_file_system(url: str, setting: str) -> Any:
    """Return fsspec's file system for a URL, without its own retries."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        import fsspec

        if protocol == "s3":
            options["config_kwargs"] = {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": CONNECTIONS,
                "retries": {"total_max_attempts": 1},
            }
        elif protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
            headers = {"Accept-Encoding": "identity"}
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "headers": headers}
        system = fsspec.filesystem(protocol, **options)
    except ImportError:
        raise UserError(
            f"{setting}={url}: package {PACKAGES[protocol]} is not installed; run pip install 'distav[remote]'."
        ) from None
    if protocol == "s3":
        system.retries = 1
    return system
