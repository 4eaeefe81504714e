"""Bounds of settings, declared as metadata of each setting and checked by one walker.

For example: `lr: float = field(default=1e-3, metadata=above(0))`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from distav.config.errors import SettingError


@dataclasses.dataclass(frozen=True)
class Bound:
    """The values that a setting allows.

    Attributes:
        holds: whether a value is allowed.
        allowed: the allowed values in words, for the error message.
        elementwise: whether a list is checked element by element, or as one value.
    """

    holds: Callable[[Any], bool]
    allowed: str
    elementwise: bool = True


Metadata = Mapping[str, Bound]
"""Metadata of a dataclass field."""


def at_least(minimum: float, note: str = "") -> Metadata:
    """Allow numbers from `minimum`; a note explains the bound in the error message."""
    return _metadata(lambda value: value >= minimum, f"{minimum:g} or more", note)


def above(limit: float, note: str = "") -> Metadata:
    """Allow numbers greater than `limit`."""
    return _metadata(lambda value: value > limit, f"a number above {limit:g}", note)


def between(low: float, high: float, note: str = "") -> Metadata:
    """Allow numbers from `low` to `high`, both included."""
    return _metadata(lambda value: low <= value <= high, f"{low:g} to {high:g}", note)


def one_of(*values: object, note: str = "") -> Metadata:
    """Allow the listed values; None is written null."""
    names = ["null" if value is None else str(value) for value in values]
    return _metadata(lambda value: value in values, f"{', '.join(names[:-1])} or {names[-1]}", note)


def satisfies(holds: Callable[[Any], Any], allowed: str) -> Metadata:
    """Allow the values, or complete lists, for which `holds` is true."""
    return {"bound": Bound(lambda value: bool(holds(value)), allowed, elementwise=False)}


def check_bounds(config: object, prefix: str = "") -> None:
    """Check all settings of a dataclass, and of the dataclasses and dictionaries in it, against their bounds.

    Args:
        config: a dataclass.
        prefix: prefix of its keys in error messages, such as `optim.`.

    Raises:
        SettingError: naming the key, its value and what is allowed.
    """
    for setting in dataclasses.fields(cast(Any, config)):
        _check_value(f"{prefix}{setting.name}", getattr(config, setting.name), setting.metadata.get("bound"))


def _check_value(key: str, value: object, bound: Bound | None) -> None:
    if dataclasses.is_dataclass(value):
        check_bounds(value, f"{key}.")
    elif isinstance(value, dict):
        for name, entry in cast(dict[str, object], value).items():
            _check_value(f"{key}.{name}", entry, bound)
    elif bound is not None and bound.elementwise and isinstance(value, list):
        elements = cast(list[object], value)
        require(bool(elements), key, elements, f"at least one value ({bound.allowed})")
        for element in elements:
            _require_bound(bound, key, element)
    elif bound is not None:
        _require_bound(bound, key, value)


def _require_bound(bound: Bound, key: str, value: object) -> None:
    require(bound.holds(value), key, value, bound.allowed)
    require(not isinstance(value, float) or math.isfinite(value), key, value, f"{bound.allowed}, and finite")


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise the error for a setting with a value that is not allowed, unless the condition holds."""
    if not condition:
        raise SettingError(key, f"{key}={value}: allowed: {allowed}.")


def _metadata(holds: Callable[[Any], bool], allowed: str, note: str) -> Metadata:
    return {"bound": Bound(holds, f"{allowed}{', ' + note if note else ''}")}
