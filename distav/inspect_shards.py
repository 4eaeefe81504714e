"""Look into a set of shards before a run relies on it.

tools/inspect_shards.py verify shards/mine
tools/inspect_shards.py verify shards/mine --labels runs/first/labels/labels.parquet
"""

import argparse
import sys
import time
from collections.abc import Sequence

from distav.data.verify import verify
from distav.errors import UserError

FAULTY = 2
"""Exit status where the set is not what was written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="inspect_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser(
        "verify",
        help="compare every file, member, index entry and label with what was written; exit status 2 for any fault",
    )
    checks.add_argument("root", metavar="SHARDS", help="the folder or URL with manifest.json")
    checks.add_argument("--labels", default="", metavar="TABLE", help="a table that is to be used as data.labels")
    checks.add_argument("--most", type=int, default=100, metavar="N", help="faults that are printed (100)")
    options = parser.parse_args(arguments)
    try:
        return _verify(options.root, options.labels, options.most)
    except UserError as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return FAULTY


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
