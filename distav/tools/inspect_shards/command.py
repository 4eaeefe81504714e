"""Check and preview a dataset before training on it.

tools/inspect_shards.py verify shards/mine
tools/inspect_shards.py stats shards/mine
tools/inspect_shards.py preview shards/mine
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distav.config.cli import CommandParser, check_minimums, check_parent_dirs, command, name_arguments
from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.tools.inspect_shards.contact_sheet import DEFAULT_FRAMES, MAX_CLIPS, preview
from distav.tools.inspect_shards.statistics import compute_stats, format_stats, stats_json
from distav.tools.inspect_shards.verify import verify

EXIT_FAULTY = 2
"""Exit status if the dataset is damaged or an argument is invalid."""

ARGUMENTS = {"data.root": "SHARDS", "data.label_overrides": "--labels"}
"""Arguments by the setting of a run that they correspond to, for error messages."""

_EPILOG = """exit status: 0 everything that was checked is valid; 2 something is damaged or could not be decoded, or an
argument is invalid."""

_EXAMPLES = {
    "verify": "inspect_shards.py verify shards/mine --labels runs/first/labels/labels.parquet",
    "stats": "inspect_shards.py stats shards/mine --clips 0 --workers 8 --json mine.json",
    "preview": "inspect_shards.py preview shards/mine --class dog --clips 12 --out dogs.png",
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    commands = {"verify": _verify, "stats": _stats, "preview": _preview}
    try:
        return commands[options.command](options)
    except UserError as error:
        print(f"inspect_shards: {name_arguments(error, ARGUMENTS)}", file=sys.stderr)
    except OSError as error:
        print(f"inspect_shards: {error.filename}: {error.strerror}", file=sys.stderr)
    return EXIT_FAULTY


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(script="inspect_shards.py", description=__doc__, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, description: str) -> argparse.ArgumentParser:
        epilog = f"example: {_EXAMPLES[name]}\n\n{_EPILOG}"
        command = commands.add_parser(
            name, help=description, description=description, epilog=epilog, formatter_class=raw
        )
        command.add_argument("root", metavar="SHARDS", help="directory or URL with manifest.json")
        return command

    add = add_command("verify", "Compare every file, member, index entry and label with the manifest.").add_argument
    add("--labels", default="", metavar="TABLE", help="table that will be used as data.label_overrides")
    add("--limit", type=int, default=100, metavar="N", help="faults to print (%(default)s)")

    add = add_command(
        "stats", "Count the content of each split, and measure frames and audio of some clips."
    ).add_argument
    add("--clips", type=int, default=1000, metavar="N", help="clips per split to decode; 0: all (%(default)s)")
    add("--seed", type=int, default=0, help="seed for selecting them (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode (%(default)s)")
    add("--limit", type=int, default=20, metavar="N", help="rows per table and keys per list (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="JSON file for the statistics of all classes and keys")

    command = add_command("preview", "Draw a contact sheet: frames and audio of some clips with their keys and labels.")
    add = command.add_argument
    add("--out", type=Path, metavar="FILE", help="image to write (SHARDS-SPLIT.png in the current directory)")
    add("--split", default="train", metavar="NAME", help="split of the clips (%(default)s)")
    add("--clips", type=int, default=24, metavar="N", help=f"clips to show, at most {MAX_CLIPS} (%(default)s)")
    add("--frames", type=int, default=DEFAULT_FRAMES, metavar="N", help="frames per clip (%(default)s)")
    add("--seed", type=int, default=0, help="seed for selecting the clips (%(default)s)")
    add("--class", default="", dest="label", metavar="NAME", help="only clips of this class")
    add("--keys", nargs="+", default=[], metavar="KEY", help="these clips, in this order")
    return parser


def _verify(options: argparse.Namespace) -> int:
    check_minimums(options, limit=0)
    started, count = time.monotonic(), 0
    for fault in verify(options.root, options.labels):
        count += 1
        if count <= options.limit:
            print(name_arguments(fault, ARGUMENTS))
    seconds = time.monotonic() - started
    if count:
        faults = "1 fault" if count == 1 else f"{count} faults"
        print(f"{options.root}: {faults} ({seconds:.1f} s). A run would quarantine these samples or stop.")
        return EXIT_FAULTY
    print(f"{options.root}: every file, member, index entry and label is valid ({seconds:.1f} s).")
    return 0


def _stats(options: argparse.Namespace) -> int:
    check_minimums(options, clips=0, seed=0, workers=1, limit=1)
    check_parent_dirs(options, "json")
    statistics = compute_stats(options.root, options.clips, options.seed, options.workers)
    print(format_stats(statistics, options.limit))
    if options.json:
        write_atomically(options.json, stats_json(statistics))
    decoded = [split["decoded"] for split in statistics["splits"].values()]
    return EXIT_FAULTY if any(split["damaged"] or split["undecodable"] for split in decoded) else 0


def _preview(options: argparse.Namespace) -> int:
    check_minimums(options, clips=1, seed=0, frames=1)
    check_parent_dirs(options, "out")
    if options.label and options.keys:
        raise UserError(f"--class={options.label} contradicts --keys, which selects the clips; remove one of them.")
    out = options.out or Path(f"{Path(options.root).resolve().name}-{options.split}.png")
    valid = preview(
        options.root, options.split, options.clips, options.seed, options.frames, options.label, options.keys, out
    )
    return 0 if valid else EXIT_FAULTY
