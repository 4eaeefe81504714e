"""The wheel, installed into a directory of its own and used from an empty one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.launch import environment

SMALL = ("data.root=shards", "run.name=tiny", "data.synthetic.enabled=false", "phases.contrastive.epochs=1",
         "phases.learn_1.epochs=1", "phases.learn_2.epochs=1", "model.visual.width=8", "model.audio.width=8",
         "optim.global_batch=24")  # fmt: skip
USE = """
import distav
model, description = distav.load_encoders("runs/tiny/export")
print(distav.__file__, len(description["classes"]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory into which the wheel of the tracked files is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


@pytest.mark.long
def test_the_wheel_trains_and_audits_in_an_empty_directory(installed: Path, tmp_path: Path):
    variables = environment() | {"PYTHONPATH": str(installed)}

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [*program.split(), *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(f"{installed}/bin/distav-make-shards", "synthetic", "shards", "--train-clips", "96", "--test-clips", "24")
    run(f"{installed}/bin/distav-train", "--config", "quickstart", *SMALL)
    assert json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())["samples"] == 96
    run(f"{installed}/bin/distav-audit", "runs/tiny", "--out", "audit.html")
    assert (tmp_path / "audit.html").stat().st_size > 10_000
    run(f"{installed}/bin/distav-evaluate", "runs/tiny/export", "shards", "--protocol", "retrieval")
    path, num_classes = run(f"{sys.executable} -c", USE).split()
    assert Path(path).is_relative_to(installed) and num_classes == "6"
    modules = "torch.distributed.run --standalone --nproc-per-node 1 -m distav.train"
    assert "all phases are finished" in run(f"{sys.executable} -m {modules}", "--config", "quickstart", *SMALL)
