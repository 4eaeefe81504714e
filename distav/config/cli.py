"""What the command lines have in common."""

import argparse
import os
import sys
import time

from distav.config.errors import UserError


def exit_with_error(error: UserError, program: str) -> int:
    """Print why a command ends, and return its exit status."""
    if os.environ.get("RANK", "0") != "0":
        # The first rank says the same and takes the others down; what is said here is this rank's own.
        time.sleep(3)
    print(f"{program}: {error}", file=sys.stderr)
    return 1


def add_rank_options(parser: argparse.ArgumentParser, batch: int, batched: str) -> None:
    """Add the options of a command that the launcher may start as many ranks.

    Args:
        parser: of the command.
        batch: what `--batch-size` is without being told.
        batched: what is done with a batch, for the help.
    """
    add = parser.add_argument
    add("--batch-size", type=int, default=batch, help=f"clips {batched} at a time by each rank (%(default)s)")
    add("--device", choices=("auto", "gpu", "cpu"), default="auto", help="where to compute (%(default)s)")
    add("--threads", type=int, default=0, help="CPU threads of each rank; 0: the cores shared among them")
    add("--timeout-s", type=float, default=3600.0, help="seconds a rank may keep the others waiting (%(default)g)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # The launcher adds it.
