"""The runner of tests/gpu/run.sh: what it makes of parts that pass, fail, crash, hang, or are stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.proof import PARTS, Part, figures, holds, outcomes, run
from tests.helpers.launch import ROOT
from tools.bench import command as bench


def python(code: str) -> str:
    return f"python -c {shlex.quote(code)} {{json}}"


def part(name: str, code: str, limit_s: float = 30, **thresholds: str) -> Part:
    return Part(name, "that it runs", limit_s, python(code), python(code), thresholds)


def writes(**values: float) -> str:
    found = {"figures": {name: {"value": value} for name, value in values.items()}}
    return f"import sys; open(sys.argv[1], 'w').write({json.dumps(found)!r}); print('written')"


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_what_fails_does_not_keep_the_rest_from_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lives = tmp_path / "lives"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(lives)!r}).touch()"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parts = [
        part("crashes", "import os, sys; print('about to', flush=True); os.abort()"),
        part("fails", "raise SystemExit('out of luck')"),
        part("hangs", hangs, limit_s=0.6),
        part("slow", writes(ratio=2.0), ratio="<= 1.5"),
        part("lacks", writes(other=1.0), ratio="<= 1.5"),
        part("good", writes(ratio=1.0), ratio="<= 1.5"),
    ]
    assert run(parts, tmp_path / "out", "cuda", 60) == 1
    found = summary_of(tmp_path / "out")
    each = {result["name"]: result for result in found["parts"]}
    assert {name: result["status"] for name, result in each.items()} == {
        "crashes": "error",
        "fails": "error",
        "hangs": "timed out",
        "slow": "FAILED",
        "lacks": "error",
        "good": "passed",
    }
    assert each["crashes"]["exit_status"] == -signal.SIGABRT and "about to" in each["crashes"]["reason"]
    assert "out of luck" in each["fails"]["reason"] and "no such figure" in each["lacks"]["reason"]
    assert each["good"]["figures"] == {"ratio": 1.0} and each["good"]["thresholds"][0]["passed"]
    assert found["exit_status"] == 1 and found["source"]["sha256"]
    assert (tmp_path / "out" / "good.log").read_text().endswith("written\n")
    table = capsys.readouterr().out
    assert all(name in table for name in each) and "FAILED" in table and "timed out" in table
    time.sleep(2)
    assert not lives.exists(), "what a part has started outlives it"


def test_a_missed_threshold_alone_has_a_status_of_its_own(tmp_path: Path):
    slow = part("slow", writes(ratio=2.0), ratio="<= 1.5")
    assert run([slow], tmp_path, "cuda", 60) == 3
    assert summary_of(tmp_path)["parts"][0]["thresholds"][0]["passed"] is False
    assert run([slow], tmp_path, "cpu", 60) == 0  # A rehearsal measures nothing.
    assert summary_of(tmp_path)["parts"][0]["thresholds"][0]["passed"] is None


def test_a_part_that_no_longer_fits_is_not_run(tmp_path: Path):
    sleeps = part("sleeps", "import time; time.sleep(1.2)", limit_s=2)
    assert run([sleeps, part("long", "", limit_s=10), part("short", "", limit_s=1)], tmp_path, "cpu", 2) == 1
    _, long, short = summary_of(tmp_path)["parts"]
    assert long["status"] == "not run" and "no time left" in long["reason"]
    assert short["status"] == "passed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_summary(number: signal.Signals, tmp_path: Path):
    parts = part("first", writes(a=1.0)), part("second", "import time; time.sleep(60)"), part("third", "")
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.gpu.proof import Part, run\n"
        f"sys.exit(run({parts!r}, Path({str(tmp_path)!r}), 'cpu', 300))"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "second.log").exists():
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(number)
        said = runner.communicate(timeout=20)[0].decode()
    finally:
        runner.kill()
    assert runner.returncode == 1 and "third" in said
    statuses = [(each["name"], each["status"]) for each in summary_of(tmp_path)["parts"]]
    assert statuses == [("first", "passed"), ("second", "stopped"), ("third", "not run")]


def test_the_script_runs_chosen_parts(tmp_path: Path):
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "TIME_S": "50"}
    script = str(ROOT / "tests" / "gpu" / "run.sh")
    wrong = subprocess.run([script, "out", "nothing"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and "nothing; allowed: facts" in wrong.stderr
    done = subprocess.run([script, "out", "facts"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary_of(tmp_path / "out")
    assert [each["status"] for each in found["parts"]] == ["passed"]
    assert found["machine"]["dali"]["libraries"] and found["machine"]["versions"]["torch"]


def test_outcomes_of_pytest_are_counted_even_if_it_was_stopped():
    log = """
tests/gpu/test_gpu.py::test_a[vp9] PASSED [ 20%]
[gw1] [ 40%] FAILED tests/gpu/test_gpu.py::test_b
tests/gpu/test_gpu.py::test_c SKIPPED (needs a CUDA device) [ 60%]
FAILED tests/gpu/test_gpu.py::test_b - AssertionError: 3 is not 4
SKIPPED [1] tests/gpu/test_gpu.py:24: needs a CUDA device
tests/gpu/test_gpu.py::test_that_hangs """
    found = outcomes(log)
    assert figures(found) == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert found["failures"] == {"tests/gpu/test_gpu.py::test_b": "AssertionError: 3 is not 4"}


def test_figures_of_benchmarks_and_bounds():
    found = {
        "ratios": {"a / b": {"value": 1.5, "bar": "<= 2", "met": True}},
        "figures": {"a": {"median_s": 0.5, "rate": 8.0, "unit": "clips/s"}, "c": {"value": 3, "unit": "GiB"}},
    }
    assert figures(found) == {"a / b": 1.5, "a": 0.5, "a, clips/s": 8.0, "c": 3}
    assert holds(1.7, "<= 1.7") and not holds(1.8, "<= 1.7") and holds(0.4, ">= 0.4") and not holds(0.3, ">= 0.4")
    assert not holds(float("nan"), "<= 1") and not holds(float("nan"), ">= 1")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("each", PARTS, ids=lambda each: each.name)
def test_benchmarks_understand_the_commands_of_the_parts(each: Part, device: str, tmp_path: Path):
    words = each.command(device, tmp_path / "figures.json")
    assert words[0] == sys.executable and ("-m" in words[:2] or (ROOT / words[1]).is_file())
    if words[1] == "tools/bench.py":
        options = bench._parser().parse_args(words[2:])
        assert options.device == device and options.json == tmp_path / "figures.json"


def test_parts_fit_the_time_when_they_take_half_of_their_limits():
    assert sum(each.limit_s for each in PARTS) / 2 <= 480
    assert len({each.name for each in PARTS}) == len(PARTS)
