"""Look into a set of shards before a run relies on it.

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

from distav.config.errors import UserError
from distav.data.files import write_atomically
from distav.tools.inspect_shards.contact_sheet import FRAMES, MOST_CLIPS, show
from distav.tools.inspect_shards.statistics import stats, stats_json, told
from distav.tools.inspect_shards.verify import verify

FAULTY = 2
"""Exit status where the set is not what was written."""

_EPILOG = """exit status: 0 all that was looked at is as it was written; 2 something is not, or could not be decoded,
or an argument is wrong."""

_EXAMPLES = {
    "verify": "inspect_shards.py verify shards/mine --labels runs/first/labels/labels.parquet",
    "stats": "inspect_shards.py stats shards/mine --clips 0 --workers 8 --json mine.json",
    "preview": "inspect_shards.py preview shards/mine --class dog --clips 12 --out dogs.png",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "verify":
            return _verify(options.root, options.labels, options.limit)
        return _stats(options) if options.command == "stats" else _show(options)
    except UserError as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
    except OSError as error:
        print(f"inspect_shards: {error.filename}: {error.strerror}", file=sys.stderr)
    return FAULTY


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="inspect_shards.py", description=__doc__, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        epilog = f"example: {_EXAMPLES[name]}\n\n{_EPILOG}"
        made = commands.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=raw)
        made.add_argument("root", metavar="SHARDS", help="the folder or URL with manifest.json")
        return made

    checks = command("verify", "Compare every file, member, index entry and label with what was written.")
    checks.add_argument(
        "--labels", default="", metavar="TABLE", help="a table that is to be used as data.label_overrides"
    )
    checks.add_argument("--limit", type=int, default=100, metavar="N", help="faults that are printed (%(default)s)")

    figures = command("stats", "Tell what each split holds, and how some of its clips look and sound.")
    add = figures.add_argument
    add("--clips", type=int, default=1000, metavar="N", help="clips of a split to decode; 0: all (%(default)s)")
    add("--seed", type=int, default=0, help="by which they are drawn (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode (%(default)s)")
    add("--limit", type=int, default=20, metavar="N", help="rows of a table, and keys of a list (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the same figures there, of all classes and keys")

    sheet = command("preview", "Draw a contact sheet: frames and sound of some clips, with their keys and labels.")
    add = sheet.add_argument
    add("--out", type=Path, metavar="FILE", help="picture to write (SHARDS-SPLIT.png in this folder)")
    add("--split", default="train", help="(%(default)s)")
    add("--clips", type=int, default=24, metavar="N", help=f"clips to show, up to {MOST_CLIPS} (%(default)s)")
    add("--frames", type=int, default=FRAMES, metavar="N", help="frames of each (%(default)s)")
    add("--seed", type=int, default=0, help="by which they are drawn (%(default)s)")
    chosen = sheet.add_mutually_exclusive_group()
    chosen.add_argument("--class", default="", dest="kind", metavar="NAME", help="clips of this label alone")
    chosen.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="these clips, in this order")
    return parser


def _verify(root: str, labels: str, most: int) -> int:
    began, count = time.monotonic(), 0
    for fault in verify(root, labels):
        count += 1
        if count <= most:
            print(fault)
    seconds = time.monotonic() - began
    if count:
        faults = f"{count} fault" + "s" * (count > 1)
        print(f"{root}: {faults}, in {seconds:.1f} s; the runs that use it would mask those samples or stop.")
        return FAULTY
    print(f"{root}: every file, member, index entry and label is as it was written ({seconds:.1f} s).")
    return 0


def _stats(options: argparse.Namespace) -> int:
    for name, least in (("clips", 0), ("seed", 0), ("workers", 1), ("limit", 1)):
        _at_least(name, getattr(options, name), least)
    found = stats(options.root, options.clips, options.seed, options.workers)
    print(told(found, options.limit))
    if options.json:
        write_atomically(options.json, stats_json(found))
    damaged = any(each["decoded"]["damaged"] or each["decoded"]["undecodable"] for each in found["splits"].values())
    return FAULTY if damaged else 0


def _show(options: argparse.Namespace) -> int:
    for name, least in (("clips", 1), ("seed", 0), ("frames", 1)):
        _at_least(name, getattr(options, name), least)
    out = options.out or Path(f"{Path(options.root).resolve().name}-{options.split}.png")
    whole = show(
        options.root, options.split, options.clips, options.seed, options.frames, options.kind, options.keys, out
    )
    return 0 if whole else FAULTY


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{name}={value}: allowed: from {least} up.")
