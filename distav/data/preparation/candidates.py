"""The candidates of a source: names of splits and classes, and a digest that identifies them."""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import ClipSource
from distav.data.preparation.source import AnnotatedSource, DirectorySource, Source

log = logging.getLogger("distav")

SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""Names of splits, which are part of the names of files."""
SPLIT_NAME_RULE = "letters, digits, _ and -"


def list_candidates(source: Source, out: Path) -> list[ClipSource]:
    """Return the candidates of a source, and warn about names of classes that are easily confused.

    Args:
        source: the source.
        out: directory of the dataset.

    Raises:
        UserError: if the source cannot be read, if `out` is a part of it, or for an invalid name of a split.
    """
    if isinstance(source, DirectorySource) and out.resolve().is_relative_to(source.folder.resolve()):
        raise UserError(f"{out} is in {source.folder}, the directory of the source; choose a directory outside of it.")
    candidates = source.candidates()
    for split in sorted({candidate.split for candidate in candidates}):
        if not SPLIT_NAME.fullmatch(split):
            raise UserError(f"split '{split}'; allowed in names of splits: {SPLIT_NAME_RULE}.")
    if not isinstance(source, AnnotatedSource):
        warn_of_similar_names({candidate.label for candidate in candidates})
    return candidates


def warn_of_similar_names(names: Iterable[str]) -> None:
    """Log a warning about class names that are easily confused."""
    if similar := similar_names(names):
        pairs = format_list(("/".join(map(repr, group)) for group in similar), 3)
        log.warning("classes with names that differ only in case, whitespace or Unicode form: %s", pairs)


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of two or more names that differ only in case, whitespace or Unicode form, sorted.

    Characters without width count as whitespace.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
        folded = unicodedata.normalize("NFKC", visible).casefold()
        groups.setdefault("".join(folded.split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe_candidates(candidates: list[ClipSource]) -> str:
    """Return the number of candidates and a digest of their names, intervals, labels and splits."""
    content = json.dumps([astuple(candidate) for candidate in candidates], default=str)
    return f"{len(candidates)} candidates, SHA-256 {hashlib.sha256(content.encode()).hexdigest()[:16]}"
