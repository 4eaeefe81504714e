"""The runner of tests/gpu/run.sh with parts that pass, fail, crash, hang, or are stopped."""

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

from tests.gpu.parts import PARTS, Part
from tests.gpu.proof import figures, outcomes, run, satisfies
from tests.helpers.launch import ROOT
from tools.bench import command as bench


def python_command(code: str) -> str:
    return f"python -c {shlex.quote(code)} {{json}}"


def make_part(name: str, code: str, limit_s: float = 30, **thresholds: str) -> Part:
    return Part(name, "it runs", limit_s, python_command(code), python_command(code), thresholds)


def write_figures(**values: float) -> str:
    results = {"figures": {name: {"value": value} for name, value in values.items()}}
    return f"import sys; open(sys.argv[1], 'w').write({json.dumps(results)!r}); print('written')"


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_failed_parts_do_not_prevent_the_others_from_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    survived = tmp_path / "survived"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(survived)!r}).touch()"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parts = [
        make_part("crashes", "import os, sys; print('about to', flush=True); os.abort()"),
        make_part("fails", "raise SystemExit('out of luck')"),
        make_part("hangs", hangs, limit_s=0.6),
        make_part("slow", write_figures(ratio=2.0), ratio="<= 1.5"),
        make_part("lacks", write_figures(other=1.0), ratio="<= 1.5"),
        make_part("good", write_figures(ratio=1.0), ratio="<= 1.5"),
    ]
    assert run(parts, tmp_path / "out", "cuda", 60) == 1
    summary = summary_of(tmp_path / "out")
    results = {result["name"]: result for result in summary["parts"]}
    assert {name: result["status"] for name, result in results.items()} == {
        "crashes": "error",
        "fails": "error",
        "hangs": "timed out",
        "slow": "FAILED",
        "lacks": "error",
        "good": "passed",
    }
    assert results["crashes"]["exit_status"] == -signal.SIGABRT and "about to" in results["crashes"]["reason"]
    assert "out of luck" in results["fails"]["reason"] and "figures missing" in results["lacks"]["reason"]
    assert results["good"]["figures"] == {"ratio": 1.0} and results["good"]["thresholds"][0]["passed"]
    assert summary["exit_status"] == 1 and summary["source"]["sha256"]
    assert (tmp_path / "out" / "good.log").read_text().endswith("written\n")
    table = capsys.readouterr().out
    assert all(name in table for name in results) and "FAILED" in table and "timed out" in table
    time.sleep(2)
    assert not survived.exists(), "a child process of a terminated part is still running"


def test_failed_thresholds_have_their_own_exit_status(tmp_path: Path):
    slow = make_part("slow", write_figures(ratio=2.0), ratio="<= 1.5")
    assert run([slow], tmp_path, "cuda", 60) == 3
    assert summary_of(tmp_path)["parts"][0]["thresholds"][0]["passed"] is False
    assert run([slow], tmp_path, "cpu", 60) == 0  # The rehearsal does not evaluate thresholds.
    assert summary_of(tmp_path)["parts"][0]["thresholds"][0]["passed"] is None


def test_a_part_without_enough_time_is_not_run(tmp_path: Path):
    sleeps = make_part("sleeps", "import time; time.sleep(1.2)", limit_s=2)
    assert run([sleeps, make_part("long", "", limit_s=10), make_part("short", "", limit_s=1)], tmp_path, "cpu", 2) == 1
    _, long, short = summary_of(tmp_path)["parts"]
    assert long["status"] == "not run" and "not enough time" in long["reason"]
    assert short["status"] == "passed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_summary_is_written_after_a_signal(number: signal.Signals, tmp_path: Path):
    parts = (
        make_part("first", write_figures(a=1.0)),
        make_part("second", "import time; time.sleep(60)"),
        make_part("third", ""),
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.gpu.parts import Part\nfrom tests.gpu.proof import run\n"
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
        output = runner.communicate(timeout=20)[0].decode()
    finally:
        runner.kill()
    assert runner.returncode == 1 and "third" in output
    statuses = [(result["name"], result["status"]) for result in summary_of(tmp_path)["parts"]]
    assert statuses == [("first", "passed"), ("second", "stopped"), ("third", "not run")]


def test_the_script_runs_selected_parts(tmp_path: Path):
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "TIME_S": "50"}
    script = str(ROOT / "tests" / "gpu" / "run.sh")
    invalid = subprocess.run([script, "out", "nothing"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert invalid.returncode == 2 and "nothing; allowed: facts" in invalid.stderr
    completed = subprocess.run([script, "out", "facts"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    summary = summary_of(tmp_path / "out")
    assert [result["status"] for result in summary["parts"]] == ["passed"]
    assert summary["machine"]["dali"]["libraries"] and summary["machine"]["versions"]["torch"]


def test_pytest_outcomes_are_counted_even_if_it_was_stopped():
    log = """
tests/gpu/test_gpu.py::test_a[vp9] PASSED [ 20%]
[gw1] [ 40%] FAILED tests/gpu/test_gpu.py::test_b
tests/gpu/test_gpu.py::test_c SKIPPED (needs a CUDA device) [ 60%]
FAILED tests/gpu/test_gpu.py::test_b - AssertionError: 3 is not 4
SKIPPED [1] tests/gpu/test_gpu.py:24: needs a CUDA device
tests/gpu/test_gpu.py::test_that_hangs """
    results = outcomes(log)
    assert figures(results) == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert results["failures"] == {"tests/gpu/test_gpu.py::test_b": "AssertionError: 3 is not 4"}


def test_figures_of_benchmarks_and_thresholds():
    results = {
        "ratios": {"a / b": {"value": 1.5, "threshold": "<= 2", "passed": True}},
        "figures": {"a": {"median_s": 0.5, "rate": 8.0, "unit": "clips/s"}, "c": {"value": 3, "unit": "GiB"}},
    }
    assert figures(results) == {"a / b": 1.5, "a": 0.5, "a, clips/s": 8.0, "c": 3}
    assert satisfies(1.7, "<= 1.7") and not satisfies(1.8, "<= 1.7")
    assert satisfies(0.4, ">= 0.4") and not satisfies(0.3, ">= 0.4")
    assert not satisfies(float("nan"), "<= 1") and not satisfies(float("nan"), ">= 1")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_benchmarks_accept_the_commands_of_the_parts(part: Part, device: str, tmp_path: Path):
    words = part.command(device, tmp_path / "figures.json")
    assert words[0] == sys.executable and ("-m" in words[:2] or (ROOT / words[1]).is_file())
    for path in (word.removeprefix("--ignore=") for word in words):
        assert not path.startswith("tests/") or (ROOT / path).exists()
    if words[1] == "tools/bench.py":
        options = bench._parser().parse_args(words[2:])
        assert options.device == device and options.json == tmp_path / "figures.json"


def test_half_of_the_limits_of_all_parts_fits_the_total_time():
    assert sum(part.limit_s for part in PARTS) <= 2 * 900
    assert len({part.name for part in PARTS}) == len(PARTS)
