"""Labels in the form in which datasets of other tools store them: class names, indices, or lists of these."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from distav.config.errors import UserError, format_list
from distav.data.annotations.multi_labels import LABEL_SEPARATOR, LABEL_SEPARATORS
from distav.data.preparation.encoding import RejectedClip
from distav.data.preparation.source import SourceInfo

_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and surrogates, which JSON may contain, but no UTF-8."""


def parse_labels(value: object, names: Sequence[str] = (), separator: str = "") -> tuple[str, ...]:
    """Return the classes of a sample.

    Args:
        value: class name, index of a class, or a list of these.
        names: class names by index; empty: indices are the names.
        separator: separates the classes in a text; empty: a text is one class.

    Raises:
        RejectedClip: if the value is none of these, if an index has no name, if a name is not text in one line, or if
            a class occurs twice.
    """
    if separator and isinstance(value, str) and value.strip():
        value = value.split(separator)
    values = value if isinstance(value, list) else [value]
    labels = tuple(_parse_label(item, names) for item in values)
    if not labels:
        raise RejectedClip("no label: the list is empty")
    if repeated := next((label for position, label in enumerate(labels) if label in labels[:position]), None):
        raise RejectedClip(f"repeated label: {ascii(repeated)[:80]} occurs twice in the list")
    return labels


def _parse_label(value: object, names: Sequence[str]) -> str:
    if isinstance(value, str) and value.strip():
        text = value.strip()
        if _NO_TEXT.search(text):
            raise RejectedClip(f"no label: {ascii(text)[:80]} contains a line break or another control character")
        if not (names and text.isdecimal()):
            return text
        value = int(text)
    if isinstance(value, int) and not isinstance(value, bool):
        if not names and value >= 0:
            return str(value)
        if 0 <= value < len(names):
            return names[value]
        allowed = f"0 to {len(names) - 1}, the indices of the class names" if names else "0 and more"
        raise RejectedClip(f"no label: {value}; allowed: {allowed}")
    text = "empty" if value in (None, "") else repr(value)[:80]
    raise RejectedClip(f"no label: {text}; allowed: a class name, an index, or a list of these")


def join_labels(labels: Sequence[str], where: str) -> str:
    """Return the label of a candidate with these classes.

    Raises:
        UserError: if a class name of a multi-label candidate has the separator in it.
    """
    if len(labels) > 1 and any(LABEL_SEPARATOR in label for label in labels):
        raise UserError(f"{where}: class names may not contain '{LABEL_SEPARATOR}': {format_list(labels)}.")
    return LABEL_SEPARATOR.join(labels)


def source_info(labels: Iterable[Sequence[str]], names: Sequence[str], multi_label: bool) -> SourceInfo:
    """Return the classes of a source: the given names, or all labels, indices in numerical order."""
    classes = list(names)
    if not classes:
        used = {label for sample in labels for label in sample}
        numeric = all(label.isdecimal() for label in used)
        classes = sorted(used, key=int) if numeric else sorted(used)
    return SourceInfo(classes, multi_label)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the class names in a text file, one per line.

    Raises:
        UserError: for a missing or empty file, or a name that occurs twice, with its line number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path}: {getattr(error, 'strerror', None) or error}.") from None
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            problem = f"'{name}' occurs twice" if name else "empty"
            raise UserError(f"--class-names {path}, line {number}: {problem}; needed: a class name per line.")
    if not names:
        raise UserError(f"--class-names {path}: empty; needed: a class name per line.")
    return names


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--class-names`, `--first-label` and `--label-separator`."""
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="class names by index, one per line")
    parser.add_argument("--first-label", action="store_true", help="use only the first label of a list")
    add_separator_argument(parser)


def add_separator_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--label-separator`."""
    parser.add_argument(
        "--label-separator",
        default="",
        choices=LABEL_SEPARATORS,
        help="separator of the classes in a label, as in 'dog|rain'; clips then have several classes (default: none)",
    )


def class_names_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the class names of `--class-names`; empty without the option."""
    return read_class_names(options.class_names) if options.class_names else ()
