"""Errors of stores, and the HTTP statuses that the exceptions of object stores correspond to."""

import errno
import re

from distav.config.errors import UserError

CREDENTIALS_HELP = (
    "Credentials come from the usual environment, such as AWS_ACCESS_KEY_ID, AWS_PROFILE, "
    "GOOGLE_APPLICATION_CREDENTIALS or ~/.netrc; they must allow reading. A public bucket needs FSSPEC_S3_ANON=true."
)
_DIRECTORY_HELP = "Give the URL of a complete copy of the directory that tools/make_shards.py wrote."
_NETWORK_HELP = "Check the network, set AWS_ENDPOINT_URL if the store is not Amazon's, and try again."
_STORE_LIBRARIES = ("aiohttp", "botocore", "gcsfs", "google", "obstore", "urllib3")
"""Libraries whose exceptions are the store's; OSError is too."""
_OBSTORE_DETAILS = "\n\nDebug source:"
"""Beginning of the part of obstore's messages that describes the structures of its code."""
_TEMPORARY = (408, 425, 429)
"""Client errors after which the same request may succeed later."""


class StorageError(UserError):
    """An object cannot be read from a store, or written to it.

    Attributes:
        reason: the cause, without advice.
    """

    def __init__(self, url: str, reason: str, advice: str, setting: str = "data.root"):
        super().__init__(f"{setting}={url}: {reason}. {advice}")
        self.reason = reason


class ObjectNotFoundError(StorageError):
    """An object does not exist."""


def storage_error(url: str, name: str, status: int, detail: str) -> StorageError:
    """Return the error for an object that cannot be read.

    Args:
        url: the dataset.
        name: the object; empty for the directory itself.
        status: HTTP status; 0 if there is none.
        detail: message of the store.
    """
    if status == 404:
        return ObjectNotFoundError(url, f"no {name or 'such directory'} found ({detail})", _DIRECTORY_HELP)
    if status in (401, 403):
        return StorageError(url, f"no permission to read {name} ({detail})", CREDENTIALS_HELP)
    return StorageError(url, f"{name} cannot be read ({detail})", _NETWORK_HELP)


def is_permanent(status: int) -> bool:
    """Return whether a request with this status fails again when it is repeated."""
    return 400 <= status < 500 and status not in _TEMPORARY


def classify_error(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the message of a store's exception; status 0 if there is none.

    Raises:
        Exception: the given exception, if it does not come from a store.
    """
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not _is_from(cause, "botocore"):
        error = cause  # fsspec raises FileNotFoundError for any URL whose size a web server does not report.
    if not isinstance(error, OSError) and not _is_from(error, *_STORE_LIBRARIES):
        raise error
    type_name, message = type(error).__name__, " ".join(str(error).partition(_OBSTORE_DETAILS)[0].split()).rstrip(".")
    message = message.removeprefix(f"[Errno {getattr(error, 'errno', None)}] ") or type_name
    if isinstance(error, FileNotFoundError):
        return 404, message
    if isinstance(error, PermissionError):
        return 403, message
    if re.search("Credential|Profile|Token", type_name):
        return 401, message
    if getattr(error, "errno", None) == errno.EINVAL:
        return 400, message
    if _is_from(error, "obstore") and (code := re.search(r"status code: (\d+)", message)):
        return int(code[1]), message
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return (int(status) if status.isdigit() else 0), message


def _is_from(error: Exception, *libraries: str) -> bool:
    return type(error).__module__.partition(".")[0] in libraries
