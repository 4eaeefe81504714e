"""A dataset built by several concurrent or consecutive commands has the same bytes as one built by a single command."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.output_dir import claim_work_dir
from distav.data.preparation.shared_work import Part
from distav.tools.make_shards import main
from tests.conftest import ROOT, make_shards
from tests.unit.data.preparation.test_builder import digests

OPTIONS = ["--train-clips=140", "--test-clips=20", "--label-noise=symmetric:0.4", "--correspondence-noise=0.4",
          "--shard-samples=60", "--short-side=16", "--workers=1"]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the dataset that a single command builds."""
    out = tmp_path_factory.mktemp("expected") / "set"
    make_shards("synthetic", out, *OPTIONS)
    return digests(out)


def start_part(out: Path, part: str) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_shards.py"),
        "synthetic",
        str(out),
        *OPTIONS,
        f"--part={part}",
    ]
    return subprocess.Popen(
        command, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.long
def test_concurrent_parts_give_the_same_bytes_if_one_runs_twice_and_one_is_killed(
    expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "set"
    running = [start_part(out, part) for part in ("0/3", "1/3", "1/3", "2/3")]
    killed = running.pop()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(file.stat().st_size for file in out.glob(".work/chunk-000002-*.bin")):
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (out / ".work" / "chunk-000002.json").exists()
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "part 0/3 complete, 64 train clips encoded" in outputs[0]
    assert any("2 of 3 chunks of all parts complete" in output for output in outputs)
    assert not (out / "manifest.json").exists()
    assert main(["synthetic", str(out), *OPTIONS, "--seed=1", "--part=2/3"]) == 1
    assert "other arguments" in capsys.readouterr().err
    make_shards("synthetic", out, *OPTIONS)
    assert digests(out) == expected and not (out / ".work").exists()
    assert main(["synthetic", str(out), *OPTIONS, "--part=2/3"]) == 0
    assert "the dataset is already complete" in capsys.readouterr().out
    assert digests(out) == expected


@dataclass(frozen=True)
class NoiseSource:
    """Clips of random pixels; every tenth candidate is rejected."""

    count: int = 200

    def candidates(self) -> list[ClipSource]:
        return [ClipSource(f"clip{number}", "a", "train") for number in range(self.count)]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        if candidate.source.endswith("9"):
            raise RejectedClip("unusable")
        yield Clip(rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), np.zeros(8000, np.float32))


@pytest.mark.long
def test_parts_encode_each_chunk_once_and_report_their_progress(tmp_path: Path):
    config, out = BuildConfig(Encoding(clip_s=1, sample_rate_hz=8000)), tmp_path / "set"
    first = build_dataset(NoiseSource(), out, config, 1, Part(1, 2))
    assert (first.encoded_chunks, first.num_chunks) == (2, 4) and first.clips == {"train": 65} and first.rejected == 7
    assert sorted(file.name for file in out.glob(".work/*.json")) == [
        "chunk-000001.json", "chunk-000003.json", "recipe.json"
    ]  # fmt: skip
    again = build_dataset(NoiseSource(), out, config, 1, Part(1, 2))
    assert (again.encoded_chunks, again.clips, again.seconds) == (2, first.clips, 0.0)
    done = build_dataset(NoiseSource(), out, config, 1)
    assert done.clips == {"train": 180} and done.rejected == 20
    build_dataset(NoiseSource(), tmp_path / "one", config, 1)
    assert digests(out) == digests(tmp_path / "one")


def test_a_part_succeeds_if_the_dataset_is_completed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from distav.data.preparation import builder

    config, out = BuildConfig(Encoding(clip_s=1, sample_rate_hz=8000)), tmp_path / "set"

    def encode_after_another_build(*arguments):
        monkeypatch.undo()
        build_dataset(NoiseSource(5), out, config, 1)
        return builder.encode_all(*arguments)

    monkeypatch.setattr(builder, "encode_all", encode_after_another_build)
    result = build_dataset(NoiseSource(5), out, config, 1, Part(0, 2))
    assert result.clips == {"train": 5} and result.num_chunks is None
    assert not (out / ".work").exists()


def test_of_two_concurrent_recipes_one_is_rejected(tmp_path: Path):
    for attempt in range(20):
        work_dir, rejected = tmp_path / str(attempt) / ".work", list[int]()
        barrier = threading.Barrier(4)

        def claim(
            seed: int, work_dir: Path = work_dir, rejected: list[int] = rejected, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait()
            try:
                claim_work_dir(work_dir, {"seed": seed})
            except UserError:
                rejected.append(seed)

        threads = [threading.Thread(target=claim, args=(seed,)) for seed in (1, 2, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        accepted = json.loads((work_dir / "recipe.json").read_text())["seed"]
        assert rejected == [3 - accepted] * 2
        assert [file.name for file in work_dir.iterdir()] == ["recipe.json"]


def test_concurrent_atomic_writes_give_one_complete_content(tmp_path: Path):
    path, contents = tmp_path / "file", [bytes([number]) * 200_000 for number in range(8)]

    def write(content: bytes) -> None:
        for _ in range(5):
            write_atomically(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["3/3", "1", "a/2", "-1/2", "0/0", "1/2/3"])
def test_invalid_parts_are_reported(text: str):
    with pytest.raises(UserError, match="has to be I/N with I from 0 to N-1"):
        Part.parse(text)
    assert Part.parse("2/3") == Part(2, 3)


FAKE_SBATCH = """#!{python}
import os, subprocess, sys
script_position = sys.argv.index("{script}")
options = [word for word in sys.argv[1:script_position] if word.startswith("--")]
values = dict(option[2:].partition("=")[::2] for option in options)
script = sys.argv[script_position:]
open("submitted", "a").write(" ".join(options) + "\\n")
step = values["export"].split("MAKE_SHARDS_STEP=")[1]
first, last = map(int, values.get("array", "0-0").split("-"))
for task in range(first, last + 1):
    array = dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(last + 1)) if "array" in values else dict()
    environment = os.environ | array | dict(MAKE_SHARDS_STEP=step)
    process = subprocess.run(["bash", *script], env=environment, stdout=open("log", "a"))
    if process.returncode:
        sys.exit("a job failed")
print("17;cluster")
"""


@pytest.mark.long
def test_slurm_jobs_build_the_same_dataset(expected: dict[str, str], tmp_path: Path):
    script = str(ROOT / "configs" / "launch" / "make_shards.sh")
    (tmp_path / "sbatch").write_text(FAKE_SBATCH.format(python=sys.executable, script=script))
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [script, "synthetic", "set", *OPTIONS]
    environment = os.environ | {"PATH": path, "PARTS": "2"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert "--array=0-1" in submitted[0] and "--dependency=afterok:17 " in submitted[1]
    log = (tmp_path / "log").read_text()
    assert "part 0/2 complete" in log and "part 1/2 complete" in log and "20 test, 140 train clips written," in log
    assert digests(tmp_path / "set") == expected


def test_machines_that_share_all_work_write_the_same_bytes(expected: dict[str, str], tmp_path: Path):
    out = tmp_path / "shared"
    processes = [start_part(out, "any") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("clips written" in output and "already" not in output for output in outputs)
    assert digests(out) == expected


def test_parts_write_shards_once_all_chunks_are_encoded(expected: dict[str, str], tmp_path: Path):
    out = tmp_path / "parts"
    for part in ("0/2", "1/2"):
        assert main(["synthetic", str(out), *OPTIONS, f"--part={part}"]) == 0
    written = {path.name for path in out.glob("*.tar")}
    shards = {name for name in expected if name.endswith(".tar")}
    assert written and written < shards
    assert main(["synthetic", str(out), *OPTIONS, "--part=0/2"]) == 0
    assert {path.name for path in out.glob("*.tar")} == shards
    assert main(["synthetic", str(out), *OPTIONS]) == 0
    assert digests(out) == expected


def test_the_ray_example_builds_the_same_dataset(expected: dict[str, str], tmp_path: Path):
    pytest.importorskip("ray", reason="Ray is not installed")
    text = (ROOT / "shards" / "README.md").read_text()
    (tmp_path / "example.py").write_text(
        next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "import ray" in block)
    )
    options = [option for option in OPTIONS if not option.startswith("--workers")]
    command = [sys.executable, str(tmp_path / "example.py"), "synthetic", str(tmp_path / "set"), *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=180)
    assert digests(tmp_path / "set") == expected


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_a_clip_that_cannot_be_encoded_is_rejected(codec: str):
    clip = Clip(np.zeros((2, 2, 70000, 3), np.uint8), np.zeros(16000, np.float32))
    with pytest.raises(RejectedClip, match="cannot be encoded"):
        clip.members(Encoding(codec))
