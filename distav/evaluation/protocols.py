"""Protocols of published evaluations: YAML files with options of `distav/evaluate.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distav.config.cli import CommandParser, raise_parse_errors
from distav.config.errors import UserError, did_you_mean, format_list
from distav.config.packaged import CONFIGS, resolve_config

DIRECTORY = CONFIGS / "protocols"
"""Directory of the protocols that have a name."""


def parse_with_protocol(parser: CommandParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line whose option `--protocol` changes the defaults of others.

    Raises:
        UserError: if the protocol cannot be read, or has a key that is not an option.
    """
    options = parser.parse_args(arguments)
    if not options.protocol:
        return options
    file = protocol_file(options.protocol)
    values = _read(file)
    names = {action.dest: action for action in parser.declared if action.option_strings}
    words: list[str] = []
    for key, value in values.items():
        if key not in names or key in ("help", "protocol"):
            allowed = sorted(set(names) - {"help", "protocol", "local_rank"})
            raise UserError(f"{file}: {key}: allowed: {format_list(allowed)}.{did_you_mean(key, allowed)}")
        if isinstance(value, bool):
            words += [names[key].option_strings[0]] * value
        else:
            words += [names[key].option_strings[0], *map(str, value if isinstance(value, list) else [value])]
    # Parsed like a command line, so that types and allowed values are checked.
    positionals = ["x" for action in parser.declared if not action.option_strings]
    with raise_parse_errors(f"--protocol={file}"):
        typed = parser.parse_args([*positionals, *words])
    parser.set_defaults(**{key: getattr(typed, key) for key in values})
    return parser.parse_args(arguments)


def protocol_file(name: str) -> Path:
    """Return the file of a protocol that is given by name or path.

    Raises:
        UserError: if there is no such file.
    """
    for file in (resolve_config(name), DIRECTORY / f"{name}.yaml"):
        if file.is_file():
            return file
    known = sorted(file.stem for file in DIRECTORY.glob("*.yaml"))
    raise UserError(f"--protocol={name}: allowed: a YAML file, {format_list(known)}.{did_you_mean(name, known)}")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--protocol={file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--protocol={file}: allowed: a mapping from options to values, e.g. views: 10.")
    return {str(key): value for key, value in values.items()}
