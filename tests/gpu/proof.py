"""Runner of the GPU verification: runs the parts with time limits, evaluates and summarizes them. Started by run.sh."""

import argparse
import contextlib
import dataclasses
import hashlib
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

from tests.gpu.parts import PARTS, Part

ROOT = Path(__file__).parents[2]
GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL when a part is terminated."""
POLL_S = 0.05
SOURCES = ("configs", "distav", "tests", "tools", "pyproject.toml")
"""Files covered by the content hash of the source tree, except stored results."""
BENCH_FAILED = 3
"""Exit status of tools/bench.py if one of its own thresholds fails; its figures are complete."""


@dataclass
class Result:
    """Result of a part, as stored in summary.json."""

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
    """Run the parts one after the other; returns the exit status.

    A part starts only if at least half of its limit remains of the total time. A failed part does not prevent
    the others from running. SIGINT, SIGTERM and SIGHUP terminate the running part; the summary is written nevertheless.

    Args:
        parts: the parts to run.
        out: directory for <name>.log and <name>.json of each part, and for summary.json.
        device: cuda, or cpu for the rehearsal.
        seconds: total time limit.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = [Result(part.name, part.shows) for part in parts]
    summary = {"device": device, "started": datetime.now(UTC).isoformat(timespec="seconds"), "source": _source()}

    def save() -> int:
        status = _exit_status(results)
        summary.update(exit_status=status, seconds=round(time.monotonic() - started, 1))
        for file in (out / f"{part.name}.json" for part in parts):
            if "machine" not in summary and file.is_file():
                summary["machine"] = _read(file).get("machine", {})
        content = summary | {"parts": [dataclasses.asdict(result) for result in results]}
        partial = out / "summary.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(out / "summary.json")
        return status

    with _signals() as received:
        for number, (part, result) in enumerate(zip(parts, results, strict=True)):
            remaining = seconds - (time.monotonic() - started)
            if received:
                result.reason = f"stopped by {received[0]}"
            elif remaining < part.limit_s / 2:
                result.reason = (
                    f"not enough time: {max(0.0, remaining):.0f} s of {seconds:.0f} s, limit {part.limit_s:.0f} s"
                )
            else:
                print(f"[{number + 1}/{len(parts)}] {part.name}: {part.shows}", flush=True)
                _run_part(part, result, out, device, min(part.limit_s, remaining), received)
            save()
    status = save()
    print(_table(summary, results), flush=True)
    return status


def _run_part(part: Part, result: Result, out: Path, device: str, limit_s: float, received: list[str]) -> None:
    file, log = out / f"{part.name}.json", out / f"{part.name}.log"
    file.unlink(missing_ok=True)
    command = part.command(device, file)
    result.command, result.limit_s = shlex.join(command), limit_s
    started = time.monotonic()
    with log.open("w") as output:
        print(f"$ {result.command}", file=output, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        while process.poll() is None:
            if received:
                result.status, result.reason = "stopped", f"by {received[0]}"
                break
            if time.monotonic() - started > limit_s:
                result.status, result.reason = "timed out", f"after {limit_s:.0f} s"
                break
            time.sleep(POLL_S)
        result.exit_status = process.returncode
        # Python writes the stacks of all threads when it is aborted, which shows what a part was waiting for.
        _terminate(process, signal.SIGABRT if result.status == "timed out" else signal.SIGTERM)
    result.seconds = round(time.monotonic() - started, 1)
    _evaluate(part, result, file, log, device)


def _terminate(process: subprocess.Popen, number: signal.Signals) -> None:
    """Terminate a part and all processes of its group, at first with a signal and then with SIGKILL."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, number)
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _evaluate(part: Part, result: Result, file: Path, log: Path, device: str) -> None:
    """Read the figures of a part, even if it was stopped, and decide whether it passed."""
    is_pytest, is_bench = (word in result.command for word in (" -m pytest ", "tools/bench.py"))
    if is_pytest:
        file.write_text(json.dumps(outcomes(log.read_text(errors="replace")), indent=1) + "\n")
    result.figures = figures(_read(file))
    if is_pytest:
        counts = ", ".join(f"{count} {name}" for name, count in result.figures.items() if count)
        result.reason = ": ".join(text for text in (result.reason, counts) if text)
    for name, bound in part.thresholds.items():
        value = result.figures.get(name)
        passed = None if device == "cpu" or value is None else satisfies(value, bound)
        result.thresholds.append({"figure": name, "bound": bound, "value": value, "passed": passed})
    if result.status != "not run":
        return
    accepted = (0, BENCH_FAILED) if is_bench else (0,)
    if result.exit_status not in accepted:
        result.status, result.reason = "error", f"exit status {result.exit_status}: {_last_line(log)}"
    elif is_pytest and device == "cuda" and not result.figures["passed"]:
        result.status, result.reason = "error", f"no test passed: {result.reason}"
    elif missing := [entry["figure"] for entry in result.thresholds if entry["value"] is None]:
        result.status, result.reason = "error", f"figures missing in {file.name}: {', '.join(missing)}"
    else:
        result.status = "FAILED" if any(entry["passed"] is False for entry in result.thresholds) else "passed"


def outcomes(log: str) -> dict[str, Any]:
    """Return outcome counts and failures from the log of `pytest -v`, which may have been stopped."""
    tests = {}
    for line in log.splitlines():
        test, outcome = re.search(r"tests/\S+::\S+", line), re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if test and outcome:
            reason = line.partition(" - ")[2]
            tests[test[0]] = (outcome[0].lower(), reason or tests.get(test[0], ("", ""))[1])
    counts = {name: {"value": 0, "unit": "tests"} for name in ("passed", "failed", "error", "skipped")}
    for outcome, _ in tests.values():
        counts[outcome]["value"] += 1
    failures = {test: reason for test, (outcome, reason) in tests.items() if outcome in ("failed", "error")}
    return {"figures": counts, "failures": failures}


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return all figures and ratios of a JSON object of tools/bench.py by name."""
    values = {name: ratio["value"] for name, ratio in results.get("ratios", {}).items()}
    for name, figure in results.get("figures", {}).items():
        values[name] = figure.get("value", figure.get("median_s"))
        if "rate" in figure:
            values[f"{name}, {figure['unit']}"] = figure["rate"]
    return values


def satisfies(value: float, bound: str) -> bool:
    """Return whether a value satisfies a bound such as "<= 1.7"."""
    sign, limit = bound.split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def _exit_status(results: Sequence[Result]) -> int:
    statuses = {result.status for result in results}
    return 1 if statuses - {"passed", "FAILED"} else 3 if "FAILED" in statuses else 0


def _table(summary: Mapping[str, Any], results: Sequence[Result]) -> str:
    lines = [f"{'part':15s}{'status':11s}{'s':>7s}  exit"]
    for result in results:
        exit_status = "" if result.exit_status is None else result.exit_status
        line = f"{result.name:15s}{result.status:11s}{result.seconds:7.1f}  {exit_status!s:4s}  {result.reason}"
        lines.append(line.rstrip())
        for threshold in result.thresholds:
            if threshold["value"] is not None:
                verdict = {True: "passed", False: "FAILED", None: "not evaluated on a CPU"}[threshold["passed"]]
                figure = f"    {threshold['figure']:52s}{threshold['value']:10.4g}"
                lines.append(f"{figure}  {threshold['bound']:8s} {verdict}")
    machine, source = summary.get("machine", {}), summary["source"]
    dali = machine.get("dali", {})
    lines += [
        f"device {summary['device']}: {machine.get('gpu') or machine.get('processor', 'unknown')}; "
        f"{' '.join(f'{name} {version}' for name, version in machine.get('versions', {}).items())}",
        f"DALI {dali.get('version')} {dali.get('libraries', '')} in {dali.get('path')}",
        f"source: commit {source['commit']}{'' if source['clean'] else ' with changes'}, sha256 {source['sha256']}",
        f"{summary['seconds']:.0f} s in total, exit status {summary['exit_status']}",
    ]
    return "\n".join(lines)


def _source() -> dict[str, Any]:
    """Return the Git commit, if there is one, and a hash of the names and contents of the source files."""

    def git(*words: str) -> str | None:
        try:
            completed = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return completed.stdout.strip()

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
    """Context that collects the names of received signals instead of being terminated by them."""
    received: list[str] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file; {} if the part was stopped before writing it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:]


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run all parts or the specified ones; returns the exit status."""
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description="Verify distav on one GPU.")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for logs, JSON and summary.json")
    parser.add_argument("part", nargs="*", metavar="PART", help=f"parts to run: {', '.join(names)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearsal with small sizes")
    parser.add_argument("--seconds", type=float, default=900, help="total time limit (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.part) - set(names)):
        parser.error(f"unknown part: {', '.join(unknown)}; allowed: {', '.join(names)}")
    selected = [part for part in parts if not options.part or part.name in options.part]
    return run(selected, options.out, options.device, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
