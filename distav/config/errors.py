"""The errors a user can mend, and the help that goes with them."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message names it, what is allowed and what to do."""


def did_you_mean(name: object, allowed: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(each) for each in allowed], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def format_list(names: Iterable[object], most: int = 12) -> str:
    """Return the names as one readable line, cut after `most`."""
    every = [str(each) for each in names]
    return ", ".join(every[:most]) + (f", ... ({len(every)} in all)" if len(every) > most else "")
