"""One set made by several commands, at once and one after the other, comes out as one command makes it."""

import json
import os
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
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.encode_workers import ChunkSubset
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.output_dir import claim_work_dir
from distav.tools.make_shards import main
from tests.conftest import ROOT, make_shards
from tests.unit.data.preparation.test_builder import digests

SCENES = ["--train-clips=140", "--test-clips=20", "--label-noise=symmetric:0.4", "--correspondence-noise=0.4",
          "--shard-samples=60", "--short-side=16", "--workers=1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the set that one command makes."""
    out = tmp_path_factory.mktemp("whole") / "set"
    make_shards("synthetic", out, *SCENES)
    return digests(out)


def start(out: Path, part: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "synthetic", str(out), *SCENES, f"--part={part}"]
    return subprocess.Popen(
        command, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.long
def test_parts_max_parallel_one_of_them_twice_and_one_killed(
    whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "set"
    running = [start(out, part) for part in ("0/3", "1/3", "1/3", "2/3")]
    killed = running.pop()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(each.stat().st_size for each in out.glob(".work/chunk-000002-*.bin")):
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (out / ".work" / "chunk-000002.json").exists()
    said = [each.communicate()[0] for each in running]
    assert [each.returncode for each in running] == [0, 0, 0]
    assert "part 0/3 is done, 64 train clips" in said[0] and "2 of all 3 chunks are done" in max(said)
    assert not (out / "manifest.json").exists()
    assert main(["synthetic", str(out), *SCENES, "--seed=1", "--part=2/3"]) == 1
    assert "other arguments" in capsys.readouterr().err
    make_shards("synthetic", out, *SCENES)
    assert digests(out) == whole and not (out / ".work").exists()
    assert main(["synthetic", str(out), *SCENES, "--part=2/3"]) == 0
    assert "the set is finished" in capsys.readouterr().out
    assert digests(out) == whole


@dataclass(frozen=True)
class Plain:
    """Clips of one colour; every tenth cannot be used."""

    count: int = 200

    def candidates(self) -> list[ClipSource]:
        return [ClipSource(f"clip{number}", "a", "train") for number in range(self.count)]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        if candidate.source.endswith("9"):
            raise RejectedClip("of no use")
        yield Clip(rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), np.zeros(8000, np.float32))


@pytest.mark.long
def test_parts_hold_every_chunk_once_and_tell_what_they_did(tmp_path: Path):
    plan, out = BuildConfig(Encoding(clip_s=1, sample_rate_hz=8000)), tmp_path / "set"
    first = build_dataset(Plain(), out, plan, 1, ChunkSubset(1, 2))
    assert first.chunks == (2, 4) and first.clips == {"train": 65} and first.rejected == 7
    assert sorted(each.name for each in out.glob(".work/*.json")) == [
        "chunk-000001.json", "chunk-000003.json", "recipe.json"
    ]  # fmt: skip
    again = build_dataset(Plain(), out, plan, 1, ChunkSubset(1, 2))
    assert (again.chunks, again.clips, again.seconds) == (first.chunks, first.clips, 0.0)
    done = build_dataset(Plain(), out, plan, 1)
    assert done.clips == {"train": 180} and done.rejected == 20
    build_dataset(Plain(), tmp_path / "one", plan, 1)
    assert digests(out) == digests(tmp_path / "one")


def test_a_part_ends_well_if_the_set_is_finished_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from distav.data.preparation import builder

    plan, out = BuildConfig(Encoding(clip_s=1, sample_rate_hz=8000)), tmp_path / "set"

    def overtaken(*arguments):
        monkeypatch.undo()
        build_dataset(Plain(5), out, plan, 1)
        return builder.encode_all(*arguments)

    monkeypatch.setattr(builder, "encode_all", overtaken)
    late = build_dataset(Plain(5), out, plan, 1, ChunkSubset(0, 2))
    assert late.clips == {"train": 5} and late.chunks is None
    assert not (out / ".work").exists()


def test_of_two_recipes_at_the_same_instant_one_is_refused(tmp_path: Path):
    for number in range(20):
        work, refused = tmp_path / str(number) / ".work", list[int]()
        max_parallel = threading.Barrier(4)

        def take(
            seed: int, work: Path = work, refused: list[int] = refused, max_parallel: threading.Barrier = max_parallel
        ):
            max_parallel.wait()
            try:
                claim_work_dir(work, {"seed": seed})
            except UserError:
                refused.append(seed)

        threads = [threading.Thread(target=take, args=(seed,)) for seed in (1, 2, 1, 2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        kept = json.loads((work / "recipe.json").read_text())["seed"]
        assert refused == [3 - kept] * 2
        assert [each.name for each in work.iterdir()] == ["recipe.json"]


def test_files_written_max_parallel_are_whole(tmp_path: Path):
    path, contents = tmp_path / "file", [bytes([number]) * 200_000 for number in range(8)]

    def write(content: bytes) -> None:
        for _ in range(5):
            write_atomically(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):
        assert not path.exists() or path.read_bytes() in contents
    for each in threads:
        each.join()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["3/3", "1", "a/2", "-1/2", "0/0", "1/2/3"])
def test_parts_that_there_are_not(text: str):
    with pytest.raises(UserError, match="write I/N, with I from 0 to N-1"):
        ChunkSubset.parse(text)
    assert ChunkSubset.parse("2/3") == ChunkSubset(2, 3)


FAKE_SBATCH = """#!{python}
import os, subprocess, sys
options = [each for each in sys.argv[1:] if each.startswith("--") and sys.argv.index(each) < sys.argv.index("{script}")]
given = dict(each[2:].partition("=")[::2] for each in options)
script = sys.argv[sys.argv.index("{script}"):]
open("asked", "a").write(" ".join(options) + "\\n")
step = given["export"].split("MAKE_SHARDS_STEP=")[1]
first, last = map(int, given.get("array", "0-0").split("-"))
for task in range(first, last + 1):
    array = dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(last + 1)) if "array" in given else dict()
    environment = os.environ | array | dict(MAKE_SHARDS_STEP=step)
    done = subprocess.run(["bash", *script], env=environment, stdout=open("log", "a"))
    if done.returncode:
        sys.exit("a job failed")
print("17;cluster")
"""


@pytest.mark.long
def test_slurm_jobs_make_the_same_set(whole: dict[str, str], tmp_path: Path):
    script = str(ROOT / "configs" / "launch" / "make_shards.sh")
    (tmp_path / "sbatch").write_text(FAKE_SBATCH.format(python=sys.executable, script=script))
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [script, "synthetic", "set", *SCENES]
    environment = os.environ | {"PATH": path, "PARTS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--array=0-1" in asked[0] and "--dependency=afterok:17 " in asked[1]
    log = (tmp_path / "log").read_text()
    assert "part 0/2 is done" in log and "part 1/2 is done" in log and "20 test, 140 train clips written;" in log
    assert digests(tmp_path / "set") == whole
