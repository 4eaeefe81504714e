"""The command line of tools/bench.py."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.data.preparation.encoding import CODECS
from tools.bench.timing import Results, Setting

_EPILOG = """Candidates take turns in one process with the same threads; ratios are medians over the rounds. One thread
is timed by CPU time, more by the wall clock. exit status: 0 every bar is met; 3 one is missed; 1 or 2 it did not run.
example: bench.py bank --json tools/results/memory_bank.json
example: bench.py neighbors --threads 2 --rows 20000"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command in _OTHERS:
            _OTHERS[options.command](options)
            return 0
        results = _measured(options)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"bench: {error.name} is missing; pip install 'distav[bench]' brings it.", file=sys.stderr)
        return 1
    print(results.table())
    if options.json:
        results.save(options.json)
    return 3 if any(ratio.get("met") is False for ratio in results.ratios.values()) else 0


def _noise(options: argparse.Namespace) -> None:
    from tools.bench.noise import plots, results, runner, tables

    if options.json:
        results.stored(options.json)  # A file that cannot take the figures is told before they are made.
    made = runner.run(
        options.digits, options.work, options.seeds, options.sets, options.experiments, options.max_parallel
    )
    found = {"rows": results.trainings(*made), "votes": results.votes(*made)}
    if options.json:
        found = results.save(found, options.json)
    print(*tables.every(found["rows"]), sep="\n\n")
    if options.json:
        rows = {name: results.over_seeds(records) for name, records in found.items()}
        plots.save(rows, options.json.with_suffix(".svg"))


def _parsing(options: argparse.Namespace) -> None:
    from tools.bench import event_parsing

    found = event_parsing.run(options.annotations, options.work, options.seeds, options.max_parallel)
    print(event_parsing.table(found))
    if options.json:
        write_atomically(options.json, (json.dumps(found, indent=1) + "\n").encode())


def _audit(options: argparse.Namespace) -> None:
    from tools.bench import audit

    found = audit.run(options.runs)
    print(audit.table(found))
    if options.json:
        write_atomically(options.json, (json.dumps(found, indent=1) + "\n").encode())


def _tables(options: argparse.Namespace) -> None:
    from tools.bench.markdown import write_section

    write_section(options.readme, options.results)


_OTHERS = {"noise": _noise, "parsing": _parsing, "audit": _audit, "tables": _tables}
"""Commands that do not time candidates and have no bars."""


def _measured(options: argparse.Namespace) -> Results:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: PyTorch sees no GPU here; leave it out to measure on the CPU.")
    for key, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{key.replace('_', '-')}={value}: allowed: from 1 up.")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return options.run(Setting(device, options.threads, options.rounds), options)
    finally:
        torch.set_num_threads(before)


def _bank(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import memory_bank

    return memory_bank.run(setting, options.batch, options.rows, options.dim, options.memory_rows, options.shard_rows)


def _neighbors(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import knn

    if not options.k < options.rows or not options.k < options.ring_rows:
        raise UserError(f"--k={options.k}: allowed: below --rows and --ring-rows.")
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


_NUMBERS = {
    "bank": (_bank, "the loss over the memory bank", {"batch": 1024, "rows": 32768, "dim": 128, "memory-rows": 65536,
                                                      "shard-rows": 65536}),
    "neighbors": (_neighbors, "exact nearest neighbours", {"rows": 50000, "dim": 128, "k": 200, "queries": 4096,
                                                          "ring-rows": 20000}),
    "shards": (_shards, "reading from tars", {"samples": 2000}),
    "loader": (_loader, "batches end to end", {"clips": 384, "batch": 32}),
    "step": (_step, "a training step", {"clips": 384}),
    "scaling": (_scaling, "cost as memory_bank, batch and ranks grow", {"batch": 1024, "dim": 128}),
}  # fmt: skip
_THREADS = {"loader": 2}
_MEANINGS = {
    "batch": "samples of a step",
    "rows": "samples of the bank or set",
    "dim": "width of an embedding",
    "memory-rows": "rows where memory is measured",
    "shard-rows": "rows of the bank spread over 2 and 4 processes",
    "ring-rows": "samples of the set spread over 2 and 4 processes",
    "k": "neighbours",
    "queries": "samples searched for, besides all of them",
    "samples": "samples of the tar, 360 kB each",
    "clips": "clips of the rendered set",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="How fast distav is beside what one would use instead.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, title, numbers) in _NUMBERS.items():
        command = commands.add_parser(name, help=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        for key, default in numbers.items():
            command.add_argument(f"--{key}", type=int, default=default, help=_MEANINGS[key])
        if name == "step":
            sizes = ("small", "vit-l", "r2plus1d_18")
            command.add_argument("--towers", choices=sizes, default="small", help="size of the towers")
            meaning = "samples of a step; None: 64, for vit-l 32, for r2plus1d_18 128"
            command.add_argument("--batch", type=int, help=meaning)
            meaning = "settings that replace those of the towers, such as data.frame_size=64"
            command.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help=meaning)
        if name == "loader":
            command.add_argument("--codec", choices=tuple(CODECS), default="mjpeg", help="codec of the clips")
        _common(command, _THREADS.get(name, 1))
    noise = commands.add_parser(
        "noise",
        help="accuracy under wrong labels and wrong pairs, beside simple baselines",
        description="Train every method in every cell of the grid; what is done is kept, so a stopped run goes on.",
    )
    noise.add_argument("--digits", type=Path, required=True, help="folder with MNIST's test files and FSDD's tar")
    noise.add_argument("--work", type=Path, default=Path("runs/noise"), help="folder for shards, runs and results")
    noise.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data, noise and training")
    noise.add_argument("--sets", nargs="+", default=[], help="sets of the grid; all of them")
    noise.add_argument("--experiments", nargs="+", default=[], help="which trainings: grid, ablations, pairs; all")
    noise.add_argument(
        "--max-parallel", type=int, default=os.cpu_count() or 1, help="trainings at a time, of one core each"
    )
    noise.add_argument(
        "--json",
        type=Path,
        help="file for the figures as JSON, which adds to what it holds of other seeds; plots beside it as SVG",
    )
    parsing = commands.add_parser(
        "parsing",
        help="events heard and seen, learnt from weak and from harvested labels, on simulated features",
        description="LLP's labels with simulated features; what is done is kept, so a stopped run goes on.",
    )
    parsing.add_argument("--annotations", type=Path, required=True, help="folder with LLP's published CSV files")
    parsing.add_argument("--work", type=Path, default=Path("runs/parsing"), help="folder for shards, runs and results")
    parsing.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of features and training")
    parsing.add_argument("--max-parallel", type=int, default=1, help="trainings at a time, of one core each")
    parsing.add_argument("--json", type=Path, help="file for the figures as JSON")
    audit = commands.add_parser(
        "audit",
        help="how many of the first problems of an audit page are problems, beside cleanlab's ranking",
        description="Of finished runs on sets that know their true labels and pairs, such as those of `noise`.",
    )
    audit.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    audit.add_argument("--json", type=Path, help="file for the figures as JSON")
    readme = commands.add_parser("tables", help="write the section of the README from the JSON files")
    readme.add_argument("--results", type=Path, default=Path("tools/results"), help="folder of the JSON files")
    readme.add_argument("--readme", type=Path, default=Path("README.md"), help="the file to change")
    return parser


def _common(command: argparse.ArgumentParser, threads: int) -> None:
    command.add_argument("--threads", type=int, default=threads, help="threads of every candidate")
    command.add_argument("--rounds", type=int, default=5, help="rounds that count")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    command.add_argument("--json", type=Path, help="file for everything as one JSON object")
