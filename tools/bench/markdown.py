"""The section of the README that the JSON files of the benchmarks make."""

import json
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.data.files import write_atomically
from tools.bench.event_parsing import table
from tools.bench.noise.results import over_seeds
from tools.bench.noise.tables import every

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOISE_BEGIN, NOISE_END = "<!-- noise: begin -->", "<!-- noise: end -->"
AUDIT_BEGIN, AUDIT_END = "<!-- audit: begin -->", "<!-- audit: end -->"
PARSING_BEGIN, PARSING_END = "<!-- parsing: begin -->", "<!-- parsing: end -->"
ORDER = ("bank", "bank-2-threads", "neighbors", "neighbors-2-threads", "shards", "loader", "step")


def write_section(readme: Path, results: Path) -> None:
    """Replace what stands between the two markers.

    Raises:
        UserError: where a file or a marker is missing.
    """
    if not readme.is_file() or BEGIN not in readme.read_text():
        raise UserError(f"--readme={readme}: no file with the line {BEGIN} is there; run this in the project's folder.")
    text = _replaced(readme.read_text(), BEGIN, END, section(results))
    if (results / "noise.json").exists() and NOISE_BEGIN in text:
        text = _replaced(text, NOISE_BEGIN, NOISE_END, noise_section(results))
    if (results / "parsing.json").exists() and PARSING_BEGIN in text:
        text = _replaced(text, PARSING_BEGIN, PARSING_END, parsing_section(results))
    if (results / "audit.json").exists() and AUDIT_BEGIN in text:
        text = _replaced(text, AUDIT_BEGIN, AUDIT_END, audit_section(results))
    write_atomically(readme, text.encode())


def _replaced(text: str, begin: str, end: str, section: str) -> str:
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{section}{end}{rest.split(end, 1)[1]}"


def noise_section(results: Path) -> str:
    """Return the tables of the noise benchmark."""
    found = json.loads((results / "noise.json").read_text())
    plots = "![Accuracy, votes and pairs under noise](tools/results/noise.svg)"
    seeds = sorted({row["seeds"] for row in over_seeds(found["rows"])})
    counted = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
    told = f"Test top-1 and shares in %, mean ± standard deviation (seeds: {counted}); the best of a cell in bold."
    machines = _machines(*(("noise", each) for each in found["machines"]))
    return "\n\n".join(["", machines, told, *every(found["rows"]), plots, ""])[1:]


def parsing_section(results: Path) -> str:
    """Return the table of the parsing benchmark."""
    found = json.loads((results / "parsing.json").read_text())
    seeds = len({row["seed"] for row in found["rows"]})
    told = (
        f"Scores of LLP's 1,200 test videos, mean ± standard deviation over {seeds} seeds; **features are simulated**."
    )
    return "\n\n".join(["", _machines(("parsing", found["machine"])), told, table(found), ""])[1:]


def audit_section(results: Path) -> str:
    """Return the table of what the first problems of an audit page are worth."""
    from tools.bench.audit import table as lines

    found = json.loads((results / "audit.json").read_text())
    return "\n\n".join(["", _machines(("audit", found["machine"])), lines(found), ""])[1:]


def section(results: Path) -> str:
    """Return the section for the JSON files of a folder.

    Raises:
        UserError: where the folder holds none.
    """
    others = ("noise", "parsing", "audit")
    runs = {
        path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json")) if path.stem not in others
    }
    if not runs:
        raise UserError(f"--results={results}: no JSON file there; make them with bench.py NAME --json.")
    machines = _machines(*((name, run["machine"]) for name, run in runs.items()))
    lines = ["", machines, "", "| what | ratio | bar |", "|---|---|---|"]
    for name in [*ORDER, *sorted(set(runs) - set(ORDER) - {"scaling"})]:
        if name in runs:
            lines += _rows(name, runs[name])
    if "scaling" in runs:
        lines += ["", *_scaling(runs["scaling"])]
    return "\n".join(lines) + "\n\n"


def _machines(*runs: tuple[str, dict[str, Any]]) -> str:
    seen: dict[str, list[str]] = {}
    for name, machine in runs:
        where = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}"
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        seen.setdefault(f"{where}; Python {machine['python']}, {versions}", []).append(name)
    return " ".join(f"Measured on {where} ({', '.join(names)})." for where, names in seen.items())


def _rows(name: str, run: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{key} {value}" for key, value in run["arguments"].items())
    lines = [f"| **{name}** ({sizes}) | | |"]
    for what, ratio in run["ratios"].items():
        bar = f"{ratio['bar']}, {'met' if ratio['met'] else '**missed**'}" if "bar" in ratio else ""
        lines.append(f"| {what} | {_number(ratio['value'])} | {bar} |")
    return lines


def _scaling(run: dict[str, Any]) -> list[str]:
    figures, ratios = run["figures"], run["ratios"]
    lines = [
        "Operations of the loss are 8 B N D over all ranks, rows take 2 N D numbers over all ranks, and the wire "
        "carries (W - 1) B (16 D + 20) bytes for queries and parts of the softmax and 8 D B (W - 1) / W for fetched "
        "rows: no N. Neighbours take 2 N^2 D operations and N D (W - 1) numbers round the ring.",
        "",
        "| point | measured | measured / formula |",
        "|---|---|---|",
    ]
    for name, figure in figures.items():
        if name.startswith("plan") or name.startswith("rate"):
            continue
        match = next(
            (ratio for what, ratio in ratios.items() if what.startswith(name.replace(" of a step", " /"))), None
        )
        match = match or next((ratio for what, ratio in ratios.items() if what.startswith(name)), None)
        told = _number(match["value"]) if match else ""
        lines.append(f"| {name} | {_number(figure['value'])} {figure['unit']} | {told} |")
    lines += ["", "On paper, not run: 1,024 GPUs, 10^8 clips, 64 a GPU and step, D = 128, a sharded bank.", ""]
    lines += ["| plan | |", "|---|---|"]
    for name, figure in figures.items():
        if name.startswith("plan"):
            lines.append(f"| {name.removeprefix('plan: ').strip()} | {_number(figure['value'])} {figure['unit']} |")
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
