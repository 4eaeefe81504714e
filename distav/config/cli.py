"""Options and error handling that the command-line tools share."""

import argparse
import os
import sys
import time

from distav.config.errors import UserError


def exit_with_error(error: UserError, program: str) -> int:
    """Print an error message to stderr and return exit status 1."""
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 prints an error that all ranks have, and the launcher then ends the other ranks. After this delay the
        # error is specific to this rank.
        time.sleep(3)
    print(f"{program}: {error}", file=sys.stderr)
    return 1


def check_minimums(options: argparse.Namespace, **minimums: int) -> None:
    """Check that options are not below their minimum, which is given by the name of the option.

    Raises:
        UserError: naming the option, its value and what is allowed.
    """
    for name, minimum in minimums.items():
        value = getattr(options, name)
        if value < minimum:
            raise UserError(f"--{name.replace('_', '-')}={value}: allowed: {minimum} or more.")


def add_rank_options(parser: argparse.ArgumentParser, batch_size: int, action: str) -> None:
    """Add the options of a command that a launcher may start on several ranks.

    Args:
        parser: parser of the command.
        batch_size: default of `--batch-size`.
        action: what happens to the clips of a batch, for the help text, such as "embedded".
    """
    add = parser.add_argument
    add("--batch-size", type=int, default=batch_size, help=f"clips {action} at a time by each rank (%(default)s)")
    add("--device", choices=("auto", "gpu", "cpu"), default="auto", help="device (%(default)s)")
    add("--threads", type=int, default=0, help="CPU threads of each rank; 0 divides the cores among the ranks")
    add("--timeout-s", type=float, default=3600.0, help="seconds to wait for another rank (%(default)g)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # Added by the launcher.
