"""Command line of tools/bench.py."""

import argparse
import sys
from collections.abc import Sequence

import torch

from distav.config.cli import CommandParser, command
from distav.config.errors import UserError
from distav.data.preparation.encoding import CODECS
from tools.bench import studies
from tools.bench.coverage import command as coverage
from tools.bench.scaling import command as scaling
from tools.bench.timing import Results, Setting, add_rounds_and_json, add_timing_options, setting_of

_EPILOG = """Candidates are timed alternately in one process with the same number of threads; ratios are medians over
rounds. The clock is CPU time for one thread and wall time for more.
exit status: 0 all thresholds passed; 3 a threshold failed; 1 or 2 the benchmark did not run.
example: bench.py bank --json tools/results/bank.json
example: bench.py neighbors --threads 2 --rows 20000"""


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command in studies.COMMANDS:
            studies.COMMANDS[options.command](options)
            return 0
        if options.command in ("coverage", "scaling"):
            return {"coverage": coverage, "scaling": scaling}[options.command].execute(options)
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


def _measure(options: argparse.Namespace) -> Results:
    setting = setting_of(options)
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


def _busy(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import busy_machine

    return busy_machine.run(setting, options.clips, options.epochs)


def _storage(setting: Setting, options: argparse.Namespace) -> Results:
    from tools.bench import storage

    return storage.run(setting, options.samples)


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
    "busy": (_busy, "training beside processes that occupy the cores", {"clips": 480, "epochs": 4}),
    "storage": (_storage, "reading from an object store, with s3fs and with obstore", {"samples": 2000}),
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
    "samples": "samples of the tar files, 360 kB each",
    "epochs": "epochs of a training",
    "clips": "clips of the synthetic dataset",
}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        script="bench.py",
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
        if name in ("busy", "storage"):  # Their threads are those of training.
            command.set_defaults(threads=1, device="cpu")
            add_rounds_and_json(command)
        else:
            add_timing_options(command, _THREADS.get(name, 1))
    coverage.add_command(commands)
    scaling.add_command(commands)
    studies.add_commands(commands)
    return parser


def _add_step_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--towers", choices=("small", "vit-l", "r2plus1d_18"), default="small", help="size of the towers")
    add("--batch", type=int, help="samples per step; default: 64; 32 for vit-l, 128 for r2plus1d_18")
    meaning = "settings that override those of the towers, such as data.frame_size=64"
    add("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help=meaning)
