"""The errors a user can mend, and the help that goes with them."""

import difflib
import os
import sys
import time
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message names it, what is allowed and what to do."""


def nearest(name: object, allowed: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(each) for each in allowed], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[object], most: int = 12) -> str:
    """Return the names as one readable line, cut after `most`."""
    every = [str(each) for each in names]
    return ", ".join(every[:most]) + (f", ... ({len(every)} in all)" if len(every) > most else "")


def ended_by(error: UserError, program: str) -> int:
    """Print why a command ends, and return its exit status."""
    if os.environ.get("RANK", "0") != "0":
        # The first rank says the same and takes the others down; what is said here is this rank's own.
        time.sleep(3)
    print(f"{program}: {error}", file=sys.stderr)
    return 1
