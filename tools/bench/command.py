"""Command line of tools/bench.py."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distav.config.cli import CommandParser
from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.data.preparation.encoding import CODECS
from tools.bench.coverage import command as coverage
from tools.bench.timing import Results, Setting

_EPILOG = """Candidates are timed alternately in one process with the same number of threads; ratios are medians over
rounds. The clock is CPU time for one thread and wall time for more.
exit status: 0 all thresholds passed; 3 a threshold failed; 1 or 2 the benchmark did not run.
example: bench.py bank --json tools/results/bank.json
example: bench.py neighbors --threads 2 --rows 20000"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command in _UNTIMED:
            _UNTIMED[options.command](options)
            return 0
        if options.command == "coverage":
            return coverage.execute(options)
        results = _measure(options)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"bench: {error.name} is missing; install it with pip install 'distav[bench]'.", file=sys.stderr)
        return 1
    print(results.table())
    if options.json:
        results.save(options.json)
    return 3 if any(ratio.get("passed") is False for ratio in results.ratios.values()) else 0


def _noise(options: argparse.Namespace) -> None:
    from tools.bench.noise import plots, results, runner, tables

    if options.json:
        results.load(options.json)  # Reports a file that cannot be extended before hours of training.
    bench, jobs = runner.run_digits(
        options.digits, options.work, options.seeds, options.datasets, options.experiments, options.max_parallel
    )
    records = {"rows": results.training_records(bench, jobs), "votes": results.vote_records(bench, jobs)}
    if options.json:
        records = results.save(records, options.json)
    print(*tables.all_tables(records["rows"]), sep="\n\n")
    if options.json:
        rows = {name: results.over_seeds(added) for name, added in records.items()}
        plots.save(rows, options.json.with_suffix(".svg"))


def _natural(options: argparse.Namespace) -> None:
    from tools.bench.noise import results, runner, tables

    if options.json:
        results.load(options.json)
    bench, jobs = runner.run_natural(
        options.sources, options.work, options.seeds, options.datasets, options.visual_weights, options.max_parallel,
        options.methods, ["" if noise == "none" else noise for noise in options.label_noise], options.mismatch_rate,
    )  # fmt: skip
    records = {"rows": results.training_records(bench, jobs)}
    if options.json:
        records = results.save(records, options.json, "natural")
    print(*tables.natural_tables(records["rows"]), sep="\n\n")


def _parsing(options: argparse.Namespace) -> None:
    from tools.bench import event_parsing

    results = event_parsing.run(options.annotations, options.work, options.seeds, options.max_parallel)
    print(event_parsing.table(results))
    _write_json(options.json, results)


def _audit(options: argparse.Namespace) -> None:
    from tools.bench import audit

    results = audit.run(options.runs)
    print(audit.table(results))
    _write_json(options.json, results)


def _towers(options: argparse.Namespace) -> None:
    from tools.bench import towers

    results = towers.run(_setting(options), options.names, options.batch)
    print(towers.table(results))
    _write_json(options.json, results)


def _write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


def _tables(options: argparse.Namespace) -> None:
    from tools.bench.markdown import write_sections

    if not options.results.is_dir():
        raise UserError(f"--results={options.results}: no such directory; it has to hold the JSON files.")
    write_sections(options.out or options.results / "README.md", options.results)


_UNTIMED = {
    "noise": _noise,
    "natural": _natural,
    "parsing": _parsing,
    "audit": _audit,
    "towers": _towers,
    "tables": _tables,
}
"""Commands that do not compare candidates and have no thresholds."""


def _setting(options: argparse.Namespace) -> Setting:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: PyTorch finds no GPU; omit the option to measure on the CPU.")
    for key, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{key.replace('_', '-')}={value}: allowed: 1 or more.")
    return Setting(device, options.threads, options.rounds)


def _measure(options: argparse.Namespace) -> Results:
    setting = _setting(options)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return options.run(setting, options)
    finally:
        torch.set_num_threads(num_threads)


def _bank(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import memory_bank

    return memory_bank.run(setting, options.batch, options.rows, options.dim, options.memory_rows, options.shard_rows)


def _neighbors(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import knn

    if not options.k < options.rows or not options.k < options.ring_rows:
        raise UserError(f"--k={options.k}: allowed: less than --rows and --ring-rows.")
    return knn.run(setting, options.rows, options.dim, options.k, options.queries, options.ring_rows)


def _shards(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import shards

    return shards.run(setting, options.samples)


def _loader(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import loader

    return loader.run(setting, options.clips, options.batch, options.codec)


def _step(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import training_step

    return training_step.run(setting, options.towers, options.batch, options.clips, options.overrides)


def _scaling(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import scaling

    return scaling.run(setting, options.batch, options.dim)


_TIMED = {
    "bank": (
        _bank,
        "loss over the memory bank",
        {"batch": 1024, "rows": 32768, "dim": 128, "memory-rows": 65536, "shard-rows": 65536},
    ),
    "neighbors": (
        _neighbors,
        "exact nearest-neighbor search",
        {"rows": 50000, "dim": 128, "k": 200, "queries": 4096, "ring-rows": 20000},
    ),
    "shards": (_shards, "reading samples from tar files", {"samples": 2000}),
    "loader": (_loader, "data loading end to end", {"clips": 384, "batch": 32}),
    "step": (_step, "training step", {"clips": 384}),
    "scaling": (_scaling, "cost for growing memory bank, batch and number of ranks", {"batch": 1024, "dim": 128}),
}
"""Timing benchmarks: function, help, and integer options with their defaults."""
_THREADS = {"loader": 2}
_HELP = {
    "batch": "samples per step",
    "rows": "samples of the memory bank or the dataset",
    "dim": "dimension of the embeddings",
    "memory-rows": "samples of the memory bank for measuring memory",
    "shard-rows": "samples of the memory bank sharded over 2 and 4 processes",
    "ring-rows": "samples of the dataset sharded over 2 and 4 processes",
    "k": "number of neighbors",
    "queries": "number of queries, in addition to all samples",
    "samples": "samples of the tar file, 360 kB each",
    "clips": "clips of the synthetic dataset",
}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench.py",
        description="Compare distav with alternative implementations and baseline methods.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, title, numbers) in _TIMED.items():
        command = commands.add_parser(name, help=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        for key, default in numbers.items():
            command.add_argument(f"--{key}", type=int, default=default, help=_HELP[key])
        if name == "step":
            _add_step_options(command)
        if name == "loader":
            command.add_argument("--codec", choices=tuple(CODECS), default="mjpeg", help="codec of the clips")
        _add_timing_options(command, _THREADS.get(name, 1))
    _add_noise_command(commands)
    _add_natural_command(commands)
    _add_parsing_command(commands)
    coverage.add_command(commands)
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
    _add_timing_options(towers, 2)
    tables = commands.add_parser("tables", help="write the generated tables of a page")
    tables.add_argument("--results", type=Path, default=Path("tools/results"), help="directory of the JSON files")
    tables.add_argument("--out", type=Path, help="page whose generated sections are replaced (RESULTS/README.md)")
    return parser


def _add_step_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--towers", choices=("small", "vit-l", "r2plus1d_18"), default="small", help="size of the towers")
    add("--batch", type=int, help="samples per step; default: 64; 32 for vit-l, 128 for r2plus1d_18")
    meaning = "settings that override those of the towers, such as data.frame_size=64"
    add("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help=meaning)


def _add_timing_options(command: argparse.ArgumentParser, threads: int) -> None:
    command.add_argument("--threads", type=int, default=threads, help="number of threads of every candidate")
    command.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device")
    command.add_argument("--json", type=Path, help="JSON file for all results")


def _add_noise_command(commands: Any) -> None:
    add = commands.add_parser(
        "noise",
        help="accuracy under label noise and mismatched audio, compared with baselines",
        description="Train every method in every cell of the grid. Finished trainings are kept, and a stopped run "
        "resumes.",
    ).add_argument
    add("--digits", type=Path, required=True, help="directory with MNIST's test files and FSDD's tar file")
    add("--work", type=Path, default=Path("runs/noise"), help="directory for shards, runs and results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data, noise and training")
    add("--datasets", nargs="+", default=[], help="datasets of the grid (all)")
    add("--experiments", nargs="+", default=[], help="grid, ablations, pairs (all)")
    add("--max-parallel", type=int, default=os.cpu_count() or 1, help="parallel trainings, each on one core")
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
    add("--work", type=Path, default=Path("runs/natural"), help="directory for clips, shards, runs and results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of noise and training")
    add("--datasets", nargs="+", default=[], help="datasets (all without pretrained towers)")
    add("--methods", nargs="+", default=[], help="methods (all)")
    add("--label-noise", nargs="+", default=[], help="label noise, such as symmetric:0.4 and none (all)")
    add("--mismatch-rate", type=float, nargs="+", default=[], help="fractions of mismatched pairs (all)")
    add("--visual-weights", type=Path, help="ImageNet weights of EfficientNet-Lite0, for pretrained towers")
    add("--max-parallel", type=int, default=os.cpu_count() or 1, help="parallel trainings, each on one core")
    add("--json", type=Path, help="JSON file to which the figures are added")


def _add_parsing_command(commands: Any) -> None:
    add = commands.add_parser(
        "parsing",
        help="event parsing from weak labels and from pseudo-labels, on simulated features",
        description="LLP's labels with simulated features. Finished trainings are kept, and a stopped run resumes.",
    ).add_argument
    add("--annotations", type=Path, required=True, help="directory with LLP's published CSV files")
    add("--work", type=Path, default=Path("runs/parsing"), help="directory for shards, runs and results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of features and training")
    add("--max-parallel", type=int, default=1, help="parallel trainings, each on one core")
    add("--json", type=Path, help="JSON file for the figures")
