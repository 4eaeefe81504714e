"""Commands of tools/bench.py that study methods and networks; they compare no timings and have no thresholds."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distav.config.errors import UserError
from distav.data.files import write_atomically
from tools.bench.console_tables import from_markdown
from tools.bench.timing import add_timing_options, setting_of

if TYPE_CHECKING:
    from tools.bench.noise.grids import Selection


def add_commands(commands: Any) -> None:
    """Add the commands to the parser of tools/bench.py."""
    _add_noise_command(commands)
    _add_natural_command(commands)
    _add_parsing_command(commands)
    _add_correction_command(commands)
    audit = commands.add_parser(
        "audit",
        help="precision of the audit rankings, compared with cleanlab",
        description="Evaluate finished runs on datasets with true labels and pairs, such as those of `noise`.",
    )
    audit.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    audit.add_argument("--json", type=Path, help="JSON file for the figures")
    towers = commands.add_parser(
        "towers",
        help="parameters, input, memory and speed of towers",
        description="Measure each tower with random weights in a process of its own.",
    )
    towers.add_argument("names", nargs="*", metavar="TOWER", help="towers of the table (all)")
    towers.add_argument("--batch", type=int, default=4, help="clips per step (4)")
    add_timing_options(towers, 2)
    tasks = commands.add_parser(
        "mteb",
        help="scores of an exported network on tasks of mteb",
        description="Evaluate an exported network on audio and video tasks of mteb, which downloads their data.",
    )
    tasks.add_argument("export", nargs="?", metavar="EXPORT", help="export/ directory of a run, or hf://USER/NAME")
    tasks.add_argument("tasks", nargs="*", metavar="TASK", help="names of tasks, such as ESC50")
    tasks.add_argument("--list", action="store_true", help="print the names of all tasks with audio or video alone")
    tasks.add_argument("--views", type=int, default=3, help="parts of each input whose features are averaged (3)")
    tasks.add_argument("--work", type=Path, default=Path("runs/mteb"), help="directory for the results of mteb")
    tasks.add_argument("--json", type=Path, help="JSON file for the scores")
    tables = commands.add_parser("tables", help="write the generated tables of a page")
    tables.add_argument("--results", type=Path, default=Path("tools/results"), help="directory of the JSON files")
    tables.add_argument("--out", type=Path, help="page whose generated sections are replaced (RESULTS/README.md)")


def _noise(options: argparse.Namespace) -> None:
    from tools.bench.noise import grids, plots, results, tables

    if options.json:
        results.load(options.json)  # Reports a file that cannot be extended before hours of training.
    bench, jobs = grids.run_digits(
        options.digits, options.work, options.experiments, _selection(options), options.max_parallel
    )
    records = {"rows": results.training_records(bench, jobs), "votes": results.vote_records(bench, jobs)}
    if options.json:
        records = results.save(records, options.json)
    print(from_markdown("\n\n".join(tables.all_tables(records["rows"]))))
    if options.json:
        rows = {name: results.over_seeds(added) for name, added in records.items()}
        plots.save(rows, options.json.with_suffix(".svg"))


def _natural(options: argparse.Namespace) -> None:
    from tools.bench.noise import grids, results, tables

    if options.json:
        results.load(options.json)
    bench, jobs = grids.run_natural(
        options.sources, options.work, options.visual_weights, _selection(options), options.max_parallel
    )
    records = {"rows": results.training_records(bench, jobs)}
    if options.json:
        records = results.save(records, options.json, "natural")
    print(from_markdown("\n\n".join(tables.natural_tables(records["rows"]))))


def _selection(options: argparse.Namespace) -> "Selection":
    from tools.bench.noise.grids import Selection

    return Selection(options.seeds, options.datasets, options.methods, options.label_noise, options.mismatch_rate)


def _parsing(options: argparse.Namespace) -> None:
    from tools.bench import event_parsing

    results = event_parsing.run(options.annotations, options.work, options.seeds, options.max_parallel)
    print(from_markdown(event_parsing.table(results)))
    _write_json(options.json, results)


def _audit(options: argparse.Namespace) -> None:
    from tools.bench import audit

    results = audit.run(options.runs)
    print(from_markdown(audit.table(results)))
    _write_json(options.json, results)


def _towers(options: argparse.Namespace) -> None:
    from tools.bench import towers

    results = towers.run(setting_of(options), options.names, options.batch)
    print(from_markdown(towers.table(results)))
    _write_json(options.json, results)


def _mteb(options: argparse.Namespace) -> None:
    from tools.bench import embedding_tasks

    if options.list:
        print(*embedding_tasks.task_names(), sep="\n")
        return
    if not options.export or not options.tasks:
        raise UserError("mteb: EXPORT and the names of tasks are missing; --list shows the tasks.")
    results = embedding_tasks.run(options.export, options.tasks, options.work, options.views)
    print(from_markdown(embedding_tasks.table(results)))
    _write_json(options.json, results)


def _write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


def _tables(options: argparse.Namespace) -> None:
    from tools.bench.markdown import write_sections

    if not options.results.is_dir():
        raise UserError(f"--results={options.results}: no such directory; it has to hold the JSON files.")
    write_sections(options.out or options.results / "README.md", options.results)


def _correction(options: argparse.Namespace) -> None:
    from tools.bench import correction

    for name, minimum in (("samples", 1000), ("ranks", 1), ("probes", 1), ("classes", 2), ("dim", 2), ("threads", 1)):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < minimum:
                raise UserError(f"--{name}={value}: allowed: {minimum} or more.")
    for name in ("noise", "mismatch"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: allowed: 0 or more, below 1.")
    cases = [
        correction.Case(
            samples,
            ranks,
            search,
            options.probes if search == "ivf" else 0,
            options.classes,
            options.dim,
            options.noise,
            options.mismatch,
            options.threads,
        )
        for search in options.search
        for ranks in options.ranks
        for samples in options.samples
    ]
    results = correction.run(cases, options.json)
    print(from_markdown("\n\n".join(filter(None, (correction.table(results), correction.scaling_table(results))))))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "noise": _noise,
    "natural": _natural,
    "parsing": _parsing,
    "correction": _correction,
    "audit": _audit,
    "towers": _towers,
    "mteb": _mteb,
    "tables": _tables,
}
"""Functions of the commands by name."""


def _add_noise_command(commands: Any) -> None:
    add = commands.add_parser(
        "noise",
        help="accuracy under label noise and mismatched audio, compared with baselines",
        description="Train every method in every cell of the grid. Finished trainings are kept, and a stopped run "
        "resumes.",
    ).add_argument
    add("--digits", type=Path, required=True, help="directory with MNIST's test files and FSDD's tar file")
    _add_training_options(add, "noise", os.cpu_count() or 1)
    _add_selection_options(add, "all")
    add("--experiments", nargs="+", default=[], help="grid, ablations, pairs (all)")
    meaning = "JSON file to which the figures are added; plots are written beside it as SVG"
    add("--json", type=Path, help=meaning)


def _add_natural_command(commands: Any) -> None:
    add = commands.add_parser(
        "natural",
        help="the same on real recordings and photographs from public repositories",
        description="Train every method in every cell of the grid on natural datasets; see tools/results/README.md "
        "for the repositories. Finished trainings are kept, and a stopped run resumes.",
    ).add_argument
    add("--sources", type=Path, required=True, help="directory with clones of the repositories")
    _add_training_options(add, "natural", os.cpu_count() or 1)
    _add_selection_options(add, "all without pretrained towers")
    add("--visual-weights", type=Path, help="ImageNet weights of EfficientNet-Lite0, for pretrained towers")
    add("--json", type=Path, help="JSON file to which the figures are added")


def _add_correction_command(commands: Any) -> None:
    add = commands.add_parser(
        "correction",
        help="time and memory of a label correction for growing numbers of samples",
        description="Correct the labels of features with known truth, each time in a process of its own.",
    ).add_argument
    add("--samples", type=int, nargs="+", default=[10_000, 30_000], help="numbers of samples (10000 30000)")
    add("--ranks", type=int, nargs="+", default=[1], help="numbers of processes of one correction (1)")
    add("--search", nargs="+", choices=("exact", "ivf"), default=["exact"], help="searches for neighbors (exact)")
    add("--probes", type=int, default=128, help="lists that ivf probes for each sample (128)")
    add("--classes", type=int, default=309, help="number of classes (309)")
    add("--dim", type=int, default=128, help="width of the features of either modality (128)")
    add("--noise", type=float, default=0.4, help="fraction of wrong labels (0.4)")
    add("--mismatch", type=float, default=0.2, help="fraction of mismatched pairs (0.2)")
    add("--threads", type=int, default=1, help="threads of each process (1)")
    add("--json", type=Path, help="JSON file to which the figures are added")


def _add_parsing_command(commands: Any) -> None:
    add = commands.add_parser(
        "parsing",
        help="event parsing from weak labels and from pseudo-labels, on simulated features",
        description="LLP's labels with simulated features. Finished trainings are kept, and a stopped run resumes.",
    ).add_argument
    add("--annotations", type=Path, required=True, help="directory with LLP's published CSV files")
    _add_training_options(add, "parsing", 1)
    add("--json", type=Path, help="JSON file for the figures")


def _add_selection_options(add: Callable[..., Any], all_datasets: str) -> None:
    add("--datasets", nargs="+", default=[], help=f"datasets of the grid ({all_datasets})")
    add("--methods", nargs="+", default=[], help="methods (all)")
    add("--label-noise", nargs="+", default=[], help="label noise, such as symmetric:0.4 and none (all)")
    add("--mismatch-rate", type=float, nargs="+", default=[], help="fractions of mismatched pairs (all)")


def _add_training_options(add: Callable[..., Any], name: str, max_parallel: int) -> None:
    add("--work", type=Path, default=Path("runs") / name, help="directory for shards, runs and results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data, noise and training")
    add("--max-parallel", type=int, default=max_parallel, help="parallel trainings, each on one core")
