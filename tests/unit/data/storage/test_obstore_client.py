"""Byte ranges of S3 are read by obstore with the settings of s3fs, and by s3fs where obstore fails at first."""

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import pytest

from distav.config.errors import UserError
from distav.data.storage import object_store
from distav.data.storage.errors import ObjectNotFoundError, StorageError
from distav.data.storage.object_store import RemoteDirectory
from distav.data.storage.obstore_client import ObstoreClient
from tests.helpers.stores import CREDENTIALS, Web, web

CONTENT = bytes(range(256))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A web server that is an S3 store without listings."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.tar").write_bytes(CONTENT)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "RETRY_WAIT_S", 0.01)
    with web(tmp_path / "site") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield server


def is_by_obstore(site: Web) -> list[bool]:
    return ["object_store" in client for client in site.clients]


def test_ranges_are_read_by_obstore_and_files_by_s3fs(site: Web, tmp_path: Path):
    directory = RemoteDirectory("s3://dataset")
    assert directory.read_range("a.tar", 3, 7) == CONTENT[3:10]
    assert is_by_obstore(site) == [True] and site.requests[0][2] == "bytes=3-9"
    directory.download("a.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT and is_by_obstore(site)[-1] is False
    RemoteDirectory(site.url).read_range("a.tar", 0, 1)
    assert is_by_obstore(site)[-1] is False


def test_s3fs_reads_what_obstore_cannot_read_at_first(site: Web):
    site.fails = lambda path, attempt: 301 if site.clients and "object_store" in site.clients[-1] else ""
    directory = RemoteDirectory("s3://dataset")
    for _ in range(2):
        assert directory.read_range("a.tar", 0, 4) == CONTENT[:4]
    assert is_by_obstore(site) == [True, False, False]


def test_requests_of_obstore_are_repeated_and_their_errors_reported(site: Web):
    directory = RemoteDirectory("s3://dataset")
    directory.read_range("a.tar", 0, 4)
    for fault, num_requests in ((503, 6), (403, 1), ("reset", 6), ("truncated", 6)):
        site.requests.clear()
        site.clients.clear()
        site.fails = lambda path, attempt, fault=fault: fault
        with pytest.raises(StorageError, match=r"a.tar( cannot be read)? \(.+\)") as error:
            directory.read_range("a.tar", 0, 5)
        assert ("no permission" in error.value.reason) == (fault == 403)
        assert "\n" not in str(error.value) and "Debug" not in str(error.value)
        assert is_by_obstore(site) == [True] * num_requests
    site.fails = lambda path, attempt: 503 if attempt < 2 else ""
    assert directory.read_range("a.tar", 0, 6) == CONTENT[:6]
    with pytest.raises(ObjectNotFoundError, match=r"no b.tar found \(.*404"):
        directory.read_range("b.tar", 0, 6)
    with pytest.raises(StorageError, match="received 6 of 10 bytes"):
        directory.read_range("a.tar", 250, 10)


def test_credentials_and_region_come_from_the_profile(site: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text("[profile mine]\nregion = eu-west-3\n")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = MINE\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    RemoteDirectory("s3://dataset").read_range("a.tar", 0, 4)
    assert is_by_obstore(site) == [True]
    assert "Credential=MINE/" in site.authorizations[0] and "/eu-west-3/s3/" in site.authorizations[0]


def test_requests_to_a_public_bucket_are_not_signed(site: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    RemoteDirectory("s3://dataset").read_range("a.tar", 0, 4)
    assert is_by_obstore(site) == [True] and site.authorizations == [""]


@pytest.mark.parametrize("reason", ["settings of fsspec", "no obstore", "after a fork"])
def test_s3fs_reads_ranges_without_obstore(site: Web, monkeypatch: pytest.MonkeyPatch, reason: str):
    if reason == "settings of fsspec":
        monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": True})
    elif reason == "no obstore":
        monkeypatch.setitem(sys.modules, "obstore", None)
    else:
        monkeypatch.setattr(ObstoreClient, "_process", 1)
    assert RemoteDirectory("s3://dataset").read_range("a.tar", 0, 4) == CONTENT[:4]
    assert is_by_obstore(site) == [False]


def test_missing_credentials_are_reported(site: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no permission to read a.tar \(Unable to locate credentials\)"):
        RemoteDirectory("s3://dataset").read_range("a.tar", 0, 4)
    assert not site.requests
