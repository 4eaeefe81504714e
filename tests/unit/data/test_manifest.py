import json
from typing import Any

import pytest

from distav.config.errors import UserError
from distav.data.manifest import FORMAT, read_manifest

CLIPS = {
    "format": FORMAT,
    "classes": ["cat", "dog"],
    "codec": "mjpeg",
    "fps": 8.0,
    "sample_rate_hz": 8000,
    "splits": {"train": {"shards": [{"name": "train-000000.tar", "bytes": 4}]}},
}
STREAMS = {
    "vggish": {"modality": "audio", "steps": 10, "dim": 128},
    "resnet": {"modality": "visual", "steps": 80, "dim": 2048},
}
FEATURES = {key: CLIPS[key] for key in ("format", "classes", "splits")} | {"streams": STREAMS, "multi_label": True}


@pytest.mark.parametrize("manifest", [CLIPS, FEATURES])
def test_valid_manifest_is_returned(manifest: dict[str, Any]):
    assert read_manifest(json.dumps(manifest).encode(), "x") == manifest


@pytest.mark.parametrize("change", [{"format": 1}, {"format": FORMAT + 1}, {"format": None}])
def test_other_format_is_rejected_with_the_fix(change: dict[str, Any]):
    with pytest.raises(UserError, match="make it again with tools/make_shards.py") as error:
        read_manifest(json.dumps(CLIPS | change).encode(), "data/manifest.json")
    message = f"dataset format {change['format']}; this version of distav reads format {FORMAT}"
    assert message in str(error.value) and "data/manifest.json" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["cat", "cat"]}, "'classes' must be a list of distinct names"),
        ({"codec": "av1"}, "codec 'av1'; allowed: mjpeg, vp9, h264"),
        ({"fps": 0}, "fps 0 or sample_rate_hz 8000 is out of range"),
        ({"multi_label": "yes"}, "'multi_label' must be true or false"),
        ({"tables": []}, "'tables' has the wrong type"),
        ({"splits": []}, "'splits' is missing or has the wrong type"),
        ({"splits": {"train": {"shards": [{"name": "../a.tar", "bytes": 4}]}}}, "split 'train': 'shards' must be"),
        ({"streams": {"vggish": STREAMS["vggish"]}}, "'streams' must contain both modalities"),
        ({"streams": STREAMS | {"x": {"modality": "smell", "steps": 1, "dim": 1}}}, "stream 'x' has no valid modality"),
    ],
)
def test_invalid_manifest_is_rejected_with_the_reason(change: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        read_manifest(json.dumps(CLIPS | change).encode(), "manifest.json")
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"", b"{", b"\xff", b"[" * 100_000])
def test_file_that_is_not_a_manifest_is_rejected(content: bytes):
    with pytest.raises(UserError, match="manifest.json is not a valid manifest"):
        read_manifest(content, "manifest.json")
