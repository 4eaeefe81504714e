"""Errors that the user can fix, and suggestions for their messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An input that cannot be used. The message names the input, what is allowed and what to do."""


class SettingError(UserError):
    """A setting that cannot be used.

    Attributes:
        key: dotted key of the setting, e.g. `optim.lr`.
    """

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def similarity(name: str, candidate: str) -> float:
    """Return how similar two names are, 0..1; words in common and initials (`learning_rate`, `lr`) count too."""
    first, second = (text.lower().replace("-", "_") for text in (name, candidate))
    ratio = difflib.SequenceMatcher(None, first, second).ratio()
    first_words, second_words = first.split("_"), second.split("_")
    common = len(set(first_words) & set(second_words)) if first and second else 0
    overlap = 0.5 + 0.8 * common / (len(first_words) + len(second_words)) if common else 0.0
    is_abbreviation = any(
        len(words) > 1 and "".join(word[:1] for word in words) == short
        for words, short in ((first_words, second), (second_words, first))
    )
    return max(ratio, overlap, 0.9 if is_abbreviation else 0.0)


def closest(name: str, allowed: Iterable[str], limit: int = 1, cutoff: float = 0.5) -> list[str]:
    """Return the allowed names that are similar to a name, the most similar first."""
    scores = {candidate: similarity(name, candidate) for candidate in allowed}
    matches = [candidate for candidate, score in scores.items() if score >= cutoff]
    return sorted(matches, key=lambda candidate: -scores[candidate])[:limit]


def did_you_mean(name: object, allowed: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    matches = closest(str(name), [str(candidate) for candidate in allowed])
    return f" Did you mean '{matches[0]}'?" if matches else ""


def format_list(names: Iterable[object], limit: int = 12) -> str:
    """Return the first `limit` names, separated by commas, and the total number if there are more."""
    texts = [str(name) for name in names]
    rest = f", ... ({len(texts)} in total)" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest
