"""Parsers return a value or raise an expected error for any bytes, in bounded time."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, run_target

EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "drop", "repeat"]), st.integers(0, 2**20), st.binary(max_size=24)),
    min_size=1,
    max_size=6,
)


def apply_edits(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for operation, position, new in edits:
        start = position % (len(content) + 1)
        if operation == "set":
            content = content[:start] + new + content[start + len(new) :]
        elif operation == "cut":
            content = content[:start]
        elif operation == "drop":
            content = content[:start] + content[start + len(new) :]
        else:
            content = content[:start] + content[max(0, start - 64) : start] + content[start:]
    return content


@pytest.mark.parametrize("name", TARGETS)
def test_valid_input_is_accepted(name: str, tmp_path: Path):
    target, content = TARGETS[name]
    target(content, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(edits=EDITS)
def test_edited_input_raises_expected_errors_only(name: str, edits: list[tuple[str, int, bytes]]):
    run_target(name, apply_edits(TARGETS[name][1], edits))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True)
@given(content=st.binary(max_size=3000))
def test_random_input_raises_expected_errors_only(name: str, content: bytes):
    run_target(name, content)
