"""Markdown sections of documentation pages, generated from the JSON files of the benchmarks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.data.files import write_atomically
from tools.bench import event_parsing
from tools.bench.coverage import summary
from tools.bench.noise import tables
from tools.bench.noise.results import over_seeds
from tools.bench.scaling import report as scaling

ORDER = (
    "bank", "bank-2-threads", "bank-avx512", "neighbors", "neighbors-2-threads", "neighbors-avx512", "shards", "loader",
    "step",
)  # fmt: skip
"""Order of the timing benchmarks in the table; further ones follow by name."""


def write_sections(page: Path, results: Path) -> None:
    """Replace the text between the markers of every section for which there are results.

    Args:
        page: Markdown file with a line `<!-- NAME: begin -->` and a line `<!-- NAME: end -->` for each of its sections.
        results: directory of the JSON files.

    Raises:
        UserError: if the page, its markers or the results of the timing benchmarks are missing.
    """
    text = page.read_text() if page.is_file() else ""
    if not any(_marker(name, "begin") in text for name in SECTIONS):
        marker = _marker("benchmarks", "begin")
        raise UserError(
            f"--out={page}: no file with a line such as {marker}; run this command in the project directory."
        )
    for name, section in SECTIONS.items():
        begin, end = _marker(name, "begin"), _marker(name, "end")
        if begin in text and (name == "benchmarks" or (results / f"{name}.json").exists()):
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{section(results)}{end}{rest.split(end, 1)[1]}"
    write_atomically(page, text.encode())


def read_section(page: Path, name: str) -> str:
    """Return the text between the markers of a section."""
    return page.read_text().split(_marker(name, "begin") + "\n")[1].split(_marker(name, "end"))[0]


def _marker(name: str, position: str) -> str:
    return f"<!-- {name}: {position} -->"


def noise_section(results: Path) -> str:
    """Return the tables of the noise benchmark."""
    stored = json.loads((results / "noise.json").read_text())
    plots = "![Accuracy, k-NN votes and mismatch detection under noise](noise.svg)"
    seeds = sorted({row["seeds"] for row in over_seeds(stored["rows"])})
    num_seeds = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
    legend = (
        f"Test top-1 accuracy and rates in %, mean ± standard deviation over {num_seeds} seeds. "
        "The best method of a row is in bold."
    )
    machines = _machines(*(("noise", machine) for machine in stored["machines"]))
    return "\n\n".join(["", machines, legend, *tables.all_tables(stored["rows"]), plots, ""])[1:]


def natural_section(results: Path) -> str:
    """Return the tables of the noise benchmark on natural datasets."""
    if not (results / "natural.json").exists():
        return "\nNo results are stored.\n\n"
    stored = json.loads((results / "natural.json").read_text())
    machines = _machines(*(("natural", machine) for machine in stored["machines"]))
    return "\n\n".join(["", machines, *tables.natural_tables(stored["rows"]), ""])[1:]


def parsing_section(results: Path) -> str:
    """Return the table of the event parsing benchmark."""
    stored = json.loads((results / "parsing.json").read_text())
    seeds = len({row["seed"] for row in stored["rows"]})
    legend = (
        f"F-scores on LLP's 1,200 test videos, mean ± standard deviation over {seeds} seeds; "
        "**features are simulated**."
    )
    machine = _machines(("parsing", stored["machine"]))
    return "\n\n".join(["", machine, legend, event_parsing.table(stored), ""])[1:]


def audit_section(results: Path) -> str:
    """Return the table of the precision of the audit rankings."""
    from tools.bench import audit

    stored = json.loads((results / "audit.json").read_text())
    return "\n\n".join(["", _machines(("audit", stored["machine"])), audit.table(stored), ""])[1:]


def coverage_section(results: Path) -> str:
    """Return the thresholds, the table and the plot of the coverage benchmark."""
    if not (results / "coverage.json").exists():
        return "\nNo results are stored.\n\n"
    stored = json.loads((results / "coverage.json").read_text())
    lines = ["| measurement | value | threshold |", "|---|---|---|", *_ratio_rows("coverage", stored)]
    plot = "![True and estimated rates of every problem, by family](coverage.svg)"
    machine, table = _machines(("coverage", stored["machine"])), summary.table(stored["rows"])
    return "\n\n".join(["", machine, "\n".join(lines), summary.LEGEND, table, plot, ""])[1:]


def correction_section(results: Path) -> str:
    """Return the tables of the label correction for growing numbers of samples."""
    from tools.bench import correction

    if not (results / "correction.json").exists():
        return "\nNo results are stored.\n\n"
    stored = json.loads((results / "correction.json").read_text())
    machines = _machines(("correction", stored["machine"]))
    tables = filter(None, (correction.scaling_table(stored), correction.table(stored)))
    return "\n\n".join(["", machines, *tables, ""])[1:]


def towers_section(results: Path) -> str:
    """Return the table of the towers."""
    from tools.bench import towers

    if not (results / "towers.json").exists():
        return "\nNo results are stored.\n\n"
    stored = json.loads((results / "towers.json").read_text())
    arguments = stored["arguments"]
    legend = (
        f"Training and encoding in clips/s and the memory of a training step (weights, gradients and activations, "
        f"without the optimizer); batch size {arguments['batch']}, {arguments['threads']} threads."
    )
    return "\n\n".join(["", _machines(("towers", stored["machine"])), legend, towers.table(stored), ""])[1:]


def storage_section(results: Path) -> str:
    """Return the table of reading from an object store."""
    from tools.bench import storage

    if not (results / "storage.json").exists():
        return "\nNo results are stored.\n\n"
    stored = json.loads((results / "storage.json").read_text())
    arguments = stored["arguments"]
    legend = (
        f"An epoch of {arguments['samples']:,} samples of {arguments['sample_bytes'] // 1000} kB in random order with "
        f"an empty cache, without decoding; parts of at most {arguments['part_bytes'] >> 20} MiB. Medians over "
        "rounds. *CPU time* is that of the reading process, and *first batch* the time until it was read."
    )
    return "\n\n".join(["", _machines(("storage", stored["machine"])), legend, storage.table(stored), ""])[1:]


def scaling_section(results: Path) -> str:
    """Return the tables of the scaling benchmark."""
    if not (results / "scaling.json").exists():
        return "\nNo results are stored.\n\n"
    stored = json.loads((results / "scaling.json").read_text())
    machines = _machines(*((part, stored[part]["machine"]) for part in ("steps", "costs") if part in stored))
    return "\n\n".join(["", machines, scaling.section(stored), ""])[1:]


TABLES_OF_THEIR_OWN = ("noise", "natural", "parsing", "audit", "coverage", "towers", "correction", "scaling")
"""Files of results that are not a list of figures and ratios."""


def timing_section(results: Path) -> str:
    """Return the tables of the timing benchmarks.

    Raises:
        UserError: if the directory holds no results.
    """
    runs = {
        path.stem: json.loads(path.read_text())
        for path in sorted(results.glob("*.json"))
        if path.stem not in TABLES_OF_THEIR_OWN
    }
    if not runs:
        raise UserError(f"--results={results}: no JSON files; create them with bench.py NAME --json FILE.")
    machines = _machines(*((name, run["machine"]) for name, run in runs.items()))
    lines = ["", machines, "", "| measurement | ratio | threshold |", "|---|---|---|"]
    for name in [*ORDER, *sorted(set(runs) - set(ORDER))]:
        if name in runs:
            lines += _ratio_rows(name, runs[name])
    return "\n".join(lines) + "\n\n"


def _machines(*runs: tuple[str, dict[str, Any]]) -> str:
    names_by_machine: dict[str, list[str]] = {}
    for name, machine in runs:
        device = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}"
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        names_by_machine.setdefault(f"{device}; Python {machine['python']}, {versions}", []).append(name)
    return " ".join(f"Measured on {machine} ({', '.join(names)})." for machine, names in names_by_machine.items())


def _ratio_rows(name: str, run: dict[str, Any]) -> list[str]:
    arguments = ", ".join(f"{key} {value}" for key, value in run["arguments"].items())
    lines = [f"| **{name}** ({arguments}) | | |"]
    for measurement, ratio in run["ratios"].items():
        outcome = ""
        if "threshold" in ratio:
            outcome = f"{ratio['threshold']}, {'passed' if ratio['passed'] else '**FAILED**'}"
        lines.append(f"| {measurement} | {_number(ratio['value'])} | {outcome} |")
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


SECTIONS: dict[str, Callable[[Path], str]] = {
    "benchmarks": timing_section,
    "noise": noise_section,
    "natural": natural_section,
    "parsing": parsing_section,
    "audit": audit_section,
    "coverage": coverage_section,
    "towers": towers_section,
    "storage": storage_section,
    "correction": correction_section,
    "scaling": scaling_section,
}
"""Functions that generate the sections, by the name in their markers."""
