"""Ctrl-C and a full disk end a command without a traceback, and the same command continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from distav.config.cli import EXIT_CTRL_C
from distav.distributed.signals import EXIT_INTERRUPTED
from tests.conftest import ROOT, make_shards
from tests.helpers.launch import arguments
from tests.helpers.rank_group import RankGroup


def _restore_sigint() -> None:
    """Restore Ctrl-C, which is ignored if the tests run in the background of a shell script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_make_shards_stops_and_resumes(tmp_path: Path):
    options = ["--train-clips=1200", "--test-clips=4", "--short-side=16", "--workers=2"]
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "synthetic", str(tmp_path / "set"), *options]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=_restore_sigint
    )
    while not list(tmp_path.glob("set/.work/chunk-*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == EXIT_CTRL_C, errors
    assert "Traceback" not in errors and "interrupted" in errors
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert "1200 train" in make_shards("synthetic", tmp_path / "set", *options).stdout


def test_training_saves_a_checkpoint(tmp_path: Path, tiny_shards: Path):
    group = RankGroup(1, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    group.wait_for(lambda: "step 3/12 phase=contrastive" in group.output())
    group.signal(signal.SIGINT, 0)
    assert group.wait() == [EXIT_INTERRUPTED]
    output = group.output()
    assert "press Ctrl-C again" in output and "the same command resumes" in output and "Traceback" not in output
    assert list((tmp_path / "tiny" / "checkpoints").iterdir())


def test_a_full_disk_ends_training_with_advice(tmp_path: Path, tiny_shards: Path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").symlink_to("/dev/full")
    group = RankGroup(1, arguments(tmp_path, tiny_shards), tmp_path / "logs")
    assert group.wait() == [1]
    output = group.output()
    assert "No space left on device; free some space and rerun" in output and "Traceback" not in output, output
