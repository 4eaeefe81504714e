"""Members of tars that are no plain files, and labels that are no text."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.split_patterns import SplitPattern
from distav.data.preparation.sources.tars import TarFiles
from tests.helpers.media import write_media

ENCODING = Encoding(fps=10, short_side=16, clip_s=1.0, sample_rate_hz=8000)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_media(tmp_path_factory.mktemp("media") / "clip.mp4", 2.0).read_bytes()


def link(name: str, target: str, link_type: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = link_type, target
    return entry


def write_tar(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> TarFiles:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            tar.addfile(entry, io.BytesIO(member[1]))
    return TarFiles((SplitPattern.parse(str(path)),))


def test_hidden_members_do_not_separate_samples(video: bytes, tmp_path: Path):
    """On macOS, tar stores the attributes of each file in a hidden member before it."""
    attributes = b"\x00\x05\x16\x07" + bytes(159)
    source = write_tar(
        tmp_path / "set.tar",
        [("set/._a.mp4", attributes), ("set/a.mp4", video), ("set/._a.cls", attributes), ("set/a.cls", b"1"),
         (".DS_Store", attributes)],
    )  # fmt: skip
    (candidate,) = source.candidates()
    assert Path(candidate.source).name == "a" and candidate.label == "1"


def test_hard_links_have_the_content_of_their_target_and_other_links_are_reported(video: bytes, tmp_path: Path):
    source = write_tar(
        tmp_path / "set.tar",
        [("a.mp4", video), ("a.cls", b"0"), link("b.mp4", "a.mp4", tarfile.LNKTYPE), ("b.cls", b"1"),
         link("c.mp4", "/etc/hostname", tarfile.SYMTYPE), ("c.cls", b"1"),
         link("d.mp4", "e.mp4", tarfile.LNKTYPE), ("d.cls", b"1")],
    )  # fmt: skip
    first, second, *others = source.candidates()
    assert (first.label, second.label) == ("0", "1")
    clips = [list(source.clips(candidate, ENCODING, np.random.default_rng(0))) for candidate in (first, second)]
    assert len(clips[0]) == 2 and clips[0][0].members(ENCODING) == clips[1][0].members(ENCODING)
    assert [candidate.detail[1] for candidate in others] == [
        "not supported: c.mp4 is a link to /etc/hostname",
        "not supported: d.mp4 is a link to e.mp4",
    ]


@pytest.mark.parametrize("label", [b'"\\ud800"', b'"a\\nb"', b'"a\\u0000b"'])
def test_labels_that_no_table_can_store_are_rejected(label: bytes, video: bytes, tmp_path: Path):
    source = write_tar(tmp_path / "set.tar", [("a.mp4", video), ("a.json", b'{"k": "x"}'), ("b.mp4", video),
                                              ("b.json", b'{"k": %s}' % label)])  # fmt: skip
    source = TarFiles(source.patterns, label="json:k")
    good, bad = source.candidates()
    assert good.label == "x" and str(bad.detail[1]).startswith("no label: ")
