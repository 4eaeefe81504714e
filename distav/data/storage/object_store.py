"""Sets in object storage and on web servers: byte ranges by fsspec, asked for again where a store fails, and kept.

fsspec and what it needs for a store come with `pip install 'distav[remote]'` and are imported with the first URL.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distav.config.errors import UserError, format_list
from distav.data.integrity import MANIFEST, CorruptFileError, verify_file
from distav.data.storage.cache import Cache, default_cache_dir

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
"""The kinds of URL that are read, and what reads them."""
CONNECTIONS = 16
"""Requests of a process that are under way at a time."""
MAX_ATTEMPTS = 6
RETRY_WAIT_S = 0.5
"""Seconds before the second try; from each try to the next they double, give or take half."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 30
"""Seconds to wait for a connection, and for the next bytes of an answer."""
_LIBRARIES = ("aiohttp", "botocore", "gcsfs", "google", "urllib3")
"""Whose errors are the store's, besides those of the system."""
_LATER = (408, 425, 429)
"""Answers to a request that may be granted later."""
_CREDENTIALS = (
    "Credentials come from the usual environment, such as AWS_ACCESS_KEY_ID, AWS_PROFILE, "
    "GOOGLE_APPLICATION_CREDENTIALS or ~/.netrc; they have to allow reading. A public bucket needs FSSPEC_S3_ANON=true."
)
_PLACE = "Give the URL of the folder that tools/make_shards.py wrote, copied whole."
_NETWORK = "Mend the network, or name the store by AWS_ENDPOINT_URL where it is not Amazon's, and try again."
T = TypeVar("T")


class StorageError(UserError):
    """Something could not be read from a store.

    Attributes:
        reason: why, without what to do about it.
    """

    def __init__(self, url: str, reason: str, advice: str):
        super().__init__(f"data.root={url}: {reason}. {advice}")
        self.reason = reason


def is_url(root: str | Path) -> bool:
    """Return whether a set lies elsewhere than in a folder."""
    return "://" in str(root)


class ObjectStore:
    """A set in a store.

    Attributes:
        url: where it lies.
        manifest: the bytes of its manifest.json.
        folder: where its tables are mirrored; another one for each manifest, so that none meets tables of another.
    """

    def __init__(self, url: str, cache: str = "", cache_mib: int = 0):
        """Read the manifest, and make sure that the store gives byte ranges.

        Args:
            url: the set's folder, `s3://bucket/set`.
            cache: folder for what is kept of any set; empty for the user's own.
            cache_mib: bound of that folder in MiB; 0 keeps nothing but tables.

        Raises:
            UserError: for a URL that is not read here, a package that is missing, or a store that does not answer.
        """
        self.url = _checked(url)
        self._systems: dict[int, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            self.download(MANIFEST, path := Path(folder, MANIFEST))
            self.manifest = path.read_bytes()
        if len(self.manifest) > 1:
            self._range(MANIFEST, 1, 1)
        name = hashlib.sha256(f"{self.url}\n".encode() + self.manifest).hexdigest()[:32]
        root = Path(cache).expanduser() if cache else default_cache_dir()
        self.cache = Cache(root.absolute(), name, cache_mib << 20)
        self.folder = self.cache.folder

    def read(self, name: str, offset: int, size: int, bypass_cache: bool = False) -> bytes:
        """Return some bytes of an object, as kept on this machine or from the store.

        Args:
            name: the object.
            offset, size: which bytes.
            afresh: leave what is kept, since it proved to be damaged.

        Raises:
            Unreadable: where the store does not give them, however often it is asked.
        """
        place = f"{name}/{offset}-{size}"
        if bypass_cache:
            self.cache.drop(place)
        kept = self.cache.get(place)
        if kept is not None and len(kept) == size:
            return kept
        content = self._range(name, offset, size)
        self.cache.put(place, content)
        return content

    def mirror(self, name: str, expected: dict[str, Any] | None) -> None:
        """Have a table of the set in `folder`; one of several processes fetches it.

        Args:
            name: the table.
            expected: its size and SHA-256; None where the manifest does not tell them.

        Raises:
            UserError: where it cannot be read, or not be written here.
            Damaged: where the store has another than the manifest tells of.
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
                f"data.cache={self.cache.root}: {error.strerror or error}; name a folder on a disk of this machine "
                "that can be written."
            ) from None
        if expected:
            verify_file(self.folder, name, expected)

    def download(self, name: str, path: Path) -> None:
        """Copy a whole object into a file.

        Raises:
            Unreadable: where it cannot be read.
        """
        self._with_retries(name, lambda system: system.get_file(self._address(name), str(path)))

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Return the bytes of objects by name, None for those that are not there: of all by one listing if possible.

        Raises:
            Unreadable: where the store does not tell.
        """
        names = list(names)
        if self.listing is not None:
            return {name: self.listing.get(name) for name in names}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    @cached_property
    def listing(self) -> dict[str, int] | None:
        """Bytes of every object of the set by name; None where the store lists none, or not to us."""
        if self.url.startswith("http"):
            return None
        try:
            found = self._with_retries("", lambda system: system.ls(self.url, detail=True))
        except StorageError:
            return None
        return {each["name"].rpartition("/")[2]: each["size"] for each in found if each["type"] == "file"}

    def _size(self, name: str) -> int | None:
        try:
            return self._with_retries(name, lambda system: system.info(self._address(name)))["size"]
        except ObjectNotFoundError:
            return None

    def _range(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""

        def ask(system: Any) -> bytes:
            content = system.cat_file(self._address(name), start=offset, end=offset + size)
            if len(content) < size:
                raise OSError(f"{len(content)} of {size} bytes came")
            return content

        content = self._with_retries(name, ask)
        if len(content) > size:
            raise StorageError(self.url, "the server sends whole files, and no byte ranges", "Take a server that does.")
        return content

    def _with_retries(self, name: str, ask: Callable[[Any], T]) -> T:
        """Ask the store, and again after a while where it failed for a reason that may pass."""
        waits = [RETRY_WAIT_S * 2**number for number in range(MAX_ATTEMPTS - 1)]
        while True:
            try:
                return ask(self._system)
            except Exception as error:  # noqa: BLE001  # every store has errors of its own
                status, said = _classify_error(error)
                if 400 <= status < 500 and status not in _LATER or not waits:
                    raise _fault(self.url, name, status, said) from None
                # Not from a generator that anything learnt depends on.
                time.sleep(waits.pop(0) * random.SystemRandom().uniform(0.5, 1.5))

    def _address(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def _system(self) -> Any:
        """The file system of this process: connections do not survive a fork."""
        process = os.getpid()
        if process not in self._systems:
            self._systems[process] = _file_system(self.url)
        return self._systems[process]


class ObjectNotFoundError(StorageError):
    """An object is not there."""


def _checked(url: str) -> str:
    """Return a URL without a slash at its end, or refuse it."""
    protocol, parts = url.partition("://")[0], urlsplit(url)
    if protocol not in PACKAGES:
        raise UserError(f"data.root={url}: is not read here; allowed: a folder, or a URL of {format_list(PACKAGES)}.")
    if not parts.netloc or set("?#@") & set(url) or "::" in url:
        raise UserError(
            f"data.root={protocol}://...: allowed: {protocol}://place/folder, without a query, chains (::) or "
            f"credentials. {_CREDENTIALS}"
        )
    return url.rstrip("/")


def _file_system(url: str) -> Any:
    """Return fsspec's file system for a URL; what fails is asked for again here, and not there."""
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

            patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
            headers = {"Accept-Encoding": "identity"}
            options["client_kwargs"] = {"timeout": patience, "trust_env": True, "headers": headers}
        system = fsspec.filesystem(protocol, **options)
    except ImportError:
        raise UserError(
            f"data.root={url}: the package {PACKAGES[protocol]} is missing; pip install 'distav[remote]' brings it."
        ) from None
    if protocol == "s3":
        system.retries = 1
    return system


def _classify_error(error: Exception) -> tuple[int, str]:
    """Return an HTTP status, 0 for none, and what a store's error says; raises any other error again."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not _from(cause, "botocore"):
        error = cause  # On the web, fsspec calls missing whatever does not tell its size.
    if not isinstance(error, OSError) and not _from(error, *_LIBRARIES):
        raise error
    kind, said = type(error).__name__, " ".join(str(error).split()).rstrip(".")
    said = said.removeprefix(f"[Errno {getattr(error, 'errno', None)}] ") or kind
    if isinstance(error, FileNotFoundError):
        return 404, said
    if isinstance(error, PermissionError):
        return 403, said
    if re.search("Credential|Profile|Token", kind):
        return 401, said
    if getattr(error, "errno", None) == errno.EINVAL:
        return 400, said
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return (int(status) if status.isdigit() else 0), said


def _from(error: Exception, *libraries: str) -> bool:
    return type(error).__module__.partition(".")[0] in libraries


def _fault(url: str, name: str, status: int, said: str) -> StorageError:
    if status == 404:
        return ObjectNotFoundError(url, f"no {name or 'such folder'} there ({said})", _PLACE)
    if status in (401, 403):
        return StorageError(url, f"{name} may not be read ({said})", _CREDENTIALS)
    return StorageError(url, f"{name} cannot be read ({said})", _NETWORK)
