"""Every byte string gives a value or a typed error, in bounded time."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, feed

EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "drop", "repeat"]), st.integers(0, 2**20), st.binary(max_size=24)),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for what, place, new in edits:
        at = place % (len(content) + 1)
        if what == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif what == "cut":
            content = content[:at]
        elif what == "drop":
            content = content[:at] + content[at + len(new) :]
        else:
            content = content[:at] + content[max(0, at - 64) : at] + content[at:]
    return content


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_is_read(name: str, tmp_path):
    read, sound = TARGETS[name]
    read(sound, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(edits=EDITS)
def test_edited_bytes(name: str, edits: list[tuple[str, int, bytes]]):
    feed(name, edited(TARGETS[name][1], edits))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(content=st.binary(max_size=3000))
def test_any_bytes(name: str, content: bytes):
    feed(name, content)
