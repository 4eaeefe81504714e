"""Byte ranges of objects in S3 through obstore, which takes about half the CPU time of s3fs and needs no Python thread.

s3fs is used for everything else, and where obstore is not installed or cannot read a bucket as s3fs does. obstore comes
with `pip install 'distav[remote]'`; it is imported with the first request.
"""

import logging
import os
import threading
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

_CREDENTIALS_S = 300.0
"""How long credentials are used before botocore is asked again, which renews them in time."""
_REQUEST_TIMEOUT = "1h"
log = logging.getLogger("distav")


class ObstoreClient:
    """Reads byte ranges of the objects in one directory, with the credentials, region and endpoint that s3fs uses.

    The first request decides whether it is used. It may fail for reasons that s3fs knows how to handle, such as a
    bucket in another region or certificates of one's own.

    Args:
        url: the directory; of other protocols than s3, nothing is read.
        timeouts_s: limits for opening a connection and for the next bytes of a response.
    """

    _process: ClassVar[int | None] = None
    """Process that has obstore's threads; they do not survive a fork, and a request in the child would never end."""

    def __init__(self, url: str, timeouts_s: tuple[float, float]):
        protocol, _, location = url.partition("://")
        self._bucket, _, self._folder = location.partition("/")
        self._timeouts_s = timeouts_s
        self._disabled = protocol != "s3"
        self._store: Any = None
        self._verified = False
        self._opening = threading.Lock()

    def read_range(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a byte range of an object, which is shorter at its end; None if s3fs has to read it.

        Raises:
            Exception: of obstore, if an earlier request succeeded.
        """
        if self._disabled or ObstoreClient._process not in (None, os.getpid()):
            return None
        try:
            import obstore

            with self._opening:
                ObstoreClient._process = os.getpid()
                self._store = self._store or self._open()
            path = f"{self._folder}/{name}" if self._folder else name
            content = obstore.get_range(self._store, path, start=offset, length=size).to_bytes()
        except Exception as error:  # noqa: BLE001  # s3fs repeats the request, and reports its error.
            if self._verified:
                raise
            self._disabled = True
            log.debug("s3fs reads s3://%s instead of obstore (%s)", self._bucket, str(error).partition("\n")[0])
            return None
        self._verified = True
        return content

    def _open(self) -> Any:
        """Return obstore's store for the bucket; raises an exception where its settings are not those of s3fs."""
        import botocore.session
        from fsspec.config import conf
        from obstore.store import S3Store

        settings: dict[str, Any] = dict(conf.get("s3", {}))
        is_public = bool(settings.pop("anon", False))
        if settings:
            raise ValueError(f"fsspec has the settings {', '.join(settings)}")
        session = botocore.session.Session()
        client = session.create_client("s3")
        credentials = None if is_public else session.get_credentials()
        if not is_public and credentials is None:
            raise ValueError("no credentials")

        def provide() -> dict[str, Any]:
            frozen = credentials.get_frozen_credentials()  # pyright: ignore[reportOptionalMemberAccess]
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_S),
            }

        connect_s, read_s = self._timeouts_s
        return S3Store(
            self._bucket,
            endpoint=client.meta.endpoint_url,
            region=client.meta.region_name.replace("aws-global", "us-east-1"),
            virtual_hosted_style_request=False,
            skip_signature=is_public,
            credential_provider=None if is_public else provide,  # pyright: ignore[reportArgumentType]
            client_options={
                "allow_http": client.meta.endpoint_url.startswith("http://"),
                "connect_timeout": f"{connect_s:g}s",
                "read_timeout": f"{read_s:g}s",
                "timeout": _REQUEST_TIMEOUT,
            },
            retry_config={"max_retries": 0},
        )
