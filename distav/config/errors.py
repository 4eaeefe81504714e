"""Errors that the user can fix, and suggestions for their messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An input that cannot be used. The message names the input, what is allowed and what to do."""


def did_you_mean(name: object, allowed: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(candidate) for candidate in allowed], n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def format_list(names: Iterable[object], limit: int = 12) -> str:
    """Return the first `limit` names, separated by commas, and the total number if there are more."""
    texts = [str(name) for name in names]
    rest = f", ... ({len(texts)} in total)" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest
