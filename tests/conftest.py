import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if num_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is imported; workers that use all cores each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(num_workers))))


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic dataset with label noise and mismatched pairs."""
    out = tmp_path_factory.mktemp("shards") / "tiny"
    make_shards("synthetic", out, "--train-clips=96", "--test-clips=24", "--label-noise=symmetric:0.25",
                "--correspondence-noise=0.25", "--shard-samples=40", "--short-side=24")  # fmt: skip
    return out


def make_shards(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run tools/make_shards.py in this process, and check its exit status."""
    from distav.tools.make_shards import main

    words, out, err = [str(word) for word in arguments], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert code == status, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_make_shards(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run tools/make_shards.py as a program of its own, and check its exit status."""
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == status, process.stdout + process.stderr
    return process


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data that DISTAV_TEST_DATA names."""
    folder = os.environ.get("DISTAV_TEST_DATA")
    if not folder:
        pytest.skip("DISTAV_TEST_DATA is not set; it names a directory with avdigits/ (MNIST test images, FSDD)")
    return Path(folder)
