"""The parts that prove the GPU path, and the runner that limits, judges and summarizes them. Started by run.sh."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL for a part that is stopped."""
POLL_S = 0.05
SOURCES = ("configs", "distav", "tests", "tools", "pyproject.toml")
"""What the content hash of the tree covers, recorded results apart."""
BENCH_MISSED = 3
"""Exit status of tools/bench.py where one of its own thresholds is missed; its figures are complete."""
TESTS = "python -m pytest -v -ra --durations=8 -p no:cacheprovider -o faulthandler_timeout=60 tests/gpu"


@dataclass(frozen=True)
class Part:
    """One step of the proof.

    Attributes:
        name: of the part, and of its files in the output directory.
        shows: what is known once it has passed.
        limit_s: seconds after which it is stopped.
        gpu: its command on a GPU; `{json}` is the file for its figures.
        cpu: its command in the rehearsal on a CPU.
        thresholds: bounds on its figures, such as {"distav / bare PyTorch loop": "<= 1.05"}. In the rehearsal the
            figures have to be there but may have any value.
    """

    name: str
    shows: str
    limit_s: float
    gpu: str
    cpu: str
    thresholds: Mapping[str, str] = field(default_factory=dict)

    def command(self, device: str, file: Path) -> list[str]:
        """Return the words of its command; `file` is where its figures go."""
        words = shlex.split(self.gpu if device == "cuda" else self.cpu)
        return [{"python": sys.executable, "{json}": str(file)}.get(word, word) for word in words]


def _tests(chosen: str, gpu: str = "") -> tuple[str, str]:
    return f"{TESTS} -k '{chosen}' -m 'gpu and not long'{gpu}", f"{TESTS} -k '{chosen}'"


def _bench(gpu: str, cpu: str) -> tuple[str, str]:
    return (
        f"python tools/bench.py {gpu} --device cuda --threads 8 --json {{json}}",
        f"python tools/bench.py {cpu} --threads 2 --rounds 1 --json {{json}}",
    )


def _script(name: str) -> tuple[str, str]:
    command = f"python -m tests.gpu.scripts {name} --json {{json}} --device"
    return f"{command} cuda", f"{command} cpu"


# What these tests compare does not depend on time.
_SIDE_BY_SIDE = " -n 4" if importlib.util.find_spec("xdist") else ""
_STEP = {"distav / bare PyTorch loop": "<= 1.05"}
_WAIT = {"data wait, share of a step of 1.25 batches' time": "<= 0.02"}
PARTS = (
    Part("facts", "what the machine has", 45, *_script("facts")),
    Part(
        "h264",
        "DALI decodes on this GPU at all",
        60,
        *_tests("graph_decodes and h264"),
    ),
    Part(
        "decode",
        "MJPEG, VP9 and H.264 on the GPU are as on the CPU and by PyAV",
        60,
        *_tests("graph_decodes and not h264"),
    ),
    Part(
        "quickstart",
        "the quickstart on the GPU in bf16 at ZeRO 1 corrects labels as on the CPU",
        150,
        *_script("quickstart"),
        {
            "labels right": ">= 0.97",
            "labels right, difference": "<= 0.02",
            "noise rate, error": "<= 0.1",
            "noise rate, difference": "<= 0.05",
            "top-1": ">= 0.97",
            "top-1, difference": "<= 0.02",
        },
    ),
    Part(
        "bank",
        "time of the loss over 2M rows",
        60,
        *_bench(
            "bank --batch 4096 --rows 2000000 --dim 128",
            "bank --batch 64 --rows 4096 --dim 32 --memory-rows 4096 --shard-rows 4096",
        ),
        {"loss + gradient / matrix products": "<= 1.7"},
    ),
    Part(
        "neighbors",
        "time of the exact search among 400k samples",
        60,
        *_bench(
            "neighbors --rows 400000 --dim 256 --k 200 --rounds 3",
            "neighbors --rows 4000 --dim 32 --k 20 --queries 500 --ring-rows 600",
        ),
        {"distav / matrix product, all pairs": "<= 3"},
    ),
    Part(
        "step-vit-l",
        "time of a step with ViT-L towers",
        75,
        *_bench("step --towers vit-l --batch 32 --clips 160", "step --towers small --batch 4 --clips 64"),
        _STEP | {"rate of a step / rate of a matrix product": ">= 0.4"},
    ),
    Part(
        "step-r2plus1d",
        "time of a step with R(2+1)D-18 towers",
        75,
        *_bench("step --towers r2plus1d_18 --batch 32 --clips 160", "step --towers small --batch 4 --clips 64"),
        _STEP,
    ),
    Part(
        "loader-mjpeg",
        "batches of MJPEG decoded on the GPU",
        60,
        *_bench("loader --codec mjpeg --rounds 3", "loader --codec mjpeg --clips 32 --batch 8"),
        _WAIT,
    ),
    Part(
        "loader-h264",
        "batches of H.264 decoded on the GPU",
        60,
        *_bench("loader --codec h264 --rounds 3", "loader --codec h264 --clips 32 --batch 8"),
        _WAIT,
    ),
    Part(
        "tests",
        "what else runs on the GPU equals the CPU",
        150,
        *_tests("not graph_decodes", _SIDE_BY_SIDE),
    ),
    Part("multinode", "ten steps of configs/multinode.yaml at 128 clips fit one GPU", 90, *_script("multinode")),
)
"""In order of worth."""


@dataclass
class Result:
    """How a part went, as summary.json has it."""

    name: str
    shows: str
    status: str = "not run"
    """passed, FAILED (a threshold), error, timed out, stopped, or not run."""
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    exit_status: int | None = None
    command: str = ""
    thresholds: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def run(parts: Sequence[Part], out: Path, device: str, seconds: float) -> int:
    """Run the parts in turn; returns the exit status.

    A part starts while at least half of its limit is left of the time in all. What fails does not keep the rest from
    running. SIGINT, SIGTERM and SIGHUP stop the part that runs and leave a summary.

    Args:
        parts: what to run.
        out: directory for <name>.log and <name>.json of each part, and summary.json.
        device: cuda, or cpu for the rehearsal.
        seconds: time in all.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results = [Result(part.name, part.shows) for part in parts]
    summary = {"device": device, "began": datetime.now(UTC).isoformat(timespec="seconds"), "source": _source()}

    def save() -> int:
        status = _exit_status(results)
        summary.update(exit_status=status, seconds=round(time.monotonic() - began, 1))
        for each in (out / f"{part.name}.json" for part in parts):
            if "machine" not in summary and each.is_file():
                summary["machine"] = _read(each).get("machine", {})
        whole = summary | {"parts": [dataclasses.asdict(result) for result in results]}
        partial = out / "summary.json.partial"
        partial.write_text(json.dumps(whole, indent=1) + "\n")
        partial.replace(out / "summary.json")
        return status

    with _signals() as asked:
        for number, (part, result) in enumerate(zip(parts, results, strict=True)):
            left = seconds - (time.monotonic() - began)
            if asked:
                result.reason = "stopped before it"
            elif left < part.limit_s / 2:
                result.reason = f"no time left: {max(0.0, left):.0f} s of {seconds:.0f} s, limit {part.limit_s:.0f} s"
            else:
                print(f"[{number + 1}/{len(parts)}] {part.name}: {part.shows}", flush=True)
                _run_part(part, result, out, device, min(part.limit_s, left), asked)
            save()
    status = save()
    print(_table(summary, results), flush=True)
    return status


def _run_part(part: Part, result: Result, out: Path, device: str, limit_s: float, asked: list[str]) -> None:
    file, log = out / f"{part.name}.json", out / f"{part.name}.log"
    file.unlink(missing_ok=True)
    command = part.command(device, file)
    result.command, result.limit_s = shlex.join(command), limit_s
    began = time.monotonic()
    with log.open("w") as said:
        print(f"$ {result.command}", file=said, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None:
            if asked:
                result.status, result.reason = "stopped", f"by {asked[0]}"
                break
            if time.monotonic() - began > limit_s:
                result.status, result.reason = "timed out", f"after {limit_s:.0f} s"
                break
            time.sleep(POLL_S)
        result.exit_status = process.returncode
        _end(process)
    result.seconds = round(time.monotonic() - began, 1)
    _judge(part, result, file, log, device)


def _end(process: subprocess.Popen) -> None:
    """End a part and all that it has started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _judge(part: Part, result: Result, file: Path, log: Path, device: str) -> None:
    """Take up the figures of a part, of one that was stopped too, and decide whether it passed."""
    is_pytest, is_bench = (word in result.command for word in (" -m pytest ", "tools/bench.py"))
    if is_pytest:
        file.write_text(json.dumps(outcomes(log.read_text(errors="replace")), indent=1) + "\n")
    result.figures = figures(_read(file))
    if is_pytest:
        counts = ", ".join(f"{count} {name}" for name, count in result.figures.items() if count)
        result.reason = ": ".join(each for each in (result.reason, counts) if each)
    for name, bound in part.thresholds.items():
        value = result.figures.get(name)
        passed = None if device == "cpu" or value is None else holds(value, bound)
        result.thresholds.append({"figure": name, "bound": bound, "value": value, "passed": passed})
    if result.status != "not run":
        return
    good = (0, BENCH_MISSED) if is_bench else (0,)
    if result.exit_status not in good:
        result.status, result.reason = "error", f"exit status {result.exit_status}: {_last_line(log)}"
    elif is_pytest and device == "cuda" and not result.figures["passed"]:
        result.status, result.reason = "error", f"no test passed: {result.reason}"
    elif missing := [each["figure"] for each in result.thresholds if each["value"] is None]:
        result.status, result.reason = "error", f"no such figure in {file.name}: {', '.join(missing)}"
    else:
        result.status = "FAILED" if any(each["passed"] is False for each in result.thresholds) else "passed"


def outcomes(log: str) -> dict[str, Any]:
    """Return what `pytest -v` says of each test, of one that was stopped too: counts, and failures with reasons."""
    found = {}
    for line in log.splitlines():
        test, outcome = re.search(r"tests/\S+::\S+", line), re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if test and outcome:
            reason = line.partition(" - ")[2]
            found[test[0]] = (outcome[0].lower(), reason or found.get(test[0], ("", ""))[1])
    counts = {name: {"value": 0, "unit": "tests"} for name in ("passed", "failed", "error", "skipped")}
    for outcome, _ in found.values():
        counts[outcome]["value"] += 1
    failures = {test: reason for test, (outcome, reason) in found.items() if outcome in ("failed", "error")}
    return {"figures": counts, "failures": failures}


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers of a JSON object as tools/bench.py writes it, by name."""
    values = {name: ratio["value"] for name, ratio in found.get("ratios", {}).items()}
    for name, figure in found.get("figures", {}).items():
        values[name] = figure.get("value", figure.get("median_s"))
        if "rate" in figure:
            values[f"{name}, {figure['unit']}"] = figure["rate"]
    return values


def holds(value: float, bound: str) -> bool:
    """Whether a value keeps to a bound such as "<= 1.7"."""
    sign, limit = bound.split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def _exit_status(results: Sequence[Result]) -> int:
    statuses = {each.status for each in results}
    return 1 if statuses - {"passed", "FAILED"} else 3 if "FAILED" in statuses else 0


def _table(summary: Mapping[str, Any], results: Sequence[Result]) -> str:
    lines = [f"{'part':15s}{'status':11s}{'s':>7s}  exit"]
    for each in results:
        exit_status = "" if each.exit_status is None else each.exit_status
        lines.append(f"{each.name:15s}{each.status:11s}{each.seconds:7.1f}  {exit_status!s:4s}  {each.reason}".rstrip())
        for bar in (bar for bar in each.thresholds if bar["value"] is not None):
            judged = {True: "passed", False: "FAILED", None: "not judged on a CPU"}[bar["passed"]]
            lines.append(f"    {bar['figure']:52s}{bar['value']:10.4g}  {bar['bound']:8s} {judged}")
    machine, source = summary.get("machine", {}), summary["source"]
    dali = machine.get("dali", {})
    lines += [
        f"device {summary['device']}: {machine.get('gpu') or machine.get('processor', 'unknown')}; "
        f"{' '.join(f'{name} {version}' for name, version in machine.get('versions', {}).items())}",
        f"DALI {dali.get('version')} {dali.get('libraries', '')} in {dali.get('path')}",
        f"source: commit {source['commit']}{'' if source['clean'] else ' with changes'}, sha256 {source['sha256']}",
        f"{summary['seconds']:.0f} s in all, exit status {summary['exit_status']}",
    ]
    return "\n".join(lines)


def _source() -> dict[str, Any]:
    """Return the commit, where the tree is a Git checkout, and a hash of names and contents of its files."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    digest = hashlib.sha256()
    for top in SOURCES:
        paths = sorted((ROOT / top).rglob("*")) if (ROOT / top).is_dir() else [ROOT / top]
        for path in paths:
            name = path.relative_to(ROOT)
            if path.is_file() and {"__pycache__", "results"}.isdisjoint(name.parts):
                digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain") == "",
        "sha256": digest.hexdigest(),
    }


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Give the names of the signals that have asked to end so far, in place of being ended by them."""
    asked: list[str] = []
    before = {
        number: signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file; {} where a part was stopped before it was written."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:]


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run all parts, or those that are named; returns the exit status."""
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description="Prove the GPU path on one GPU.")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for logs, JSON and summary.json")
    parser.add_argument("part", nargs="*", metavar="PART", help=f"parts to run: {', '.join(names)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses with small sizes")
    parser.add_argument("--seconds", type=float, default=480, help="time in all (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.part) - set(names)):
        parser.error(f"no such part: {', '.join(unknown)}; allowed: {', '.join(names)}")
    chosen = [part for part in parts if not options.part or part.name in options.part]
    return run(chosen, options.out, options.device, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
