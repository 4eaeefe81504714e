"""Threads of PyTorch wait passively, unless the user decides otherwise."""

import os
import subprocess
import sys

import pytest

SHOW = """
import sys, distav, os
assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PASSIVE 0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "100"}, "PASSIVE 100"),
    ],
)
def test_the_waiting_policy_is_set_before_pytorch_is_imported(given: dict[str, str], expected: str):
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=inherited | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
