"""Options and error handling that the command-line tools share."""

import argparse
import contextlib
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from distav.config.errors import UserError, did_you_mean, format_list

_raised_prefix: ContextVar[str] = ContextVar("raised_prefix", default="")
EXIT_CTRL_C = 130
"""Exit status of a command that Ctrl-C has ended, as shells report it."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest name for an unknown option, value or command.

    Attributes:
        declared: what `add_argument` has added, in this order; `add_argument_group` and the like are not supported.
    """

    def __init__(self, *, script: str = "", **options: Any):
        """Create a parser; `options` are those of `argparse.ArgumentParser`.

        Args:
            script: name of the program, unless it was started as a command of the installed package.
        """
        started = Path(sys.argv[0]).name
        if script:
            options["prog"] = started if started.startswith("distav-") else script
        self.declared: list[argparse.Action] = []
        self._has_commands = False
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as `argparse.ArgumentParser.add_argument`."""
        action = super().add_argument(*names, **options)
        self.declared.append(action)
        return action

    def add_subparsers(self, **options: Any) -> Any:
        """Add commands as `argparse.ArgumentParser.add_subparsers`."""
        self._has_commands = True
        return super().add_subparsers(**options)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse the arguments; report an unknown option before anything that is missing because of it."""
        return super().parse_known_args(self._check_option_names(args), namespace)

    def parse_known_intermixed_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse the arguments as `parse_known_args`; positional arguments may follow options."""
        return super().parse_known_intermixed_args(self._check_option_names(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Report an invalid command line: print it and exit with status 2, or raise within `raise_parse_errors`."""
        if prefix := _raised_prefix.get():
            raise UserError(f"{prefix}: {message.removeprefix('argument ')}")
        super().error(message)

    def _check_option_names(self, args: Iterable[str] | None) -> list[str]:
        """Return the arguments, those of the process if None, after a check of the names of their options."""
        words = sys.argv[1:] if args is None else list(args)
        if self._has_commands:  # The parser of a command checks the options that follow the command.
            return words
        options = [name for action in self.declared for name in action.option_strings if name.startswith("--")]
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            is_option = name.startswith("--") and " " not in name
            if is_option and not any(option.startswith(name) for option in options):
                setting = f" Settings have no dashes: {word[2:]}." if "." in name else did_you_mean(name, options)
                self.error(f"unknown option {name}.{setting} --help lists all options.")
        return words

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = None if action.choices is None else list(action.choices)
        if choices is not None and value not in choices:
            suggestion = did_you_mean(value, choices)
            raise argparse.ArgumentError(action, f"'{value}': allowed: {format_list(choices)}.{suggestion}")


def name_arguments(message: object, arguments: Mapping[str, str]) -> str:
    """Return a message in which the settings of a run are replaced by the arguments that a tool sets them from.

    Args:
        message: an error, or its message.
        arguments: argument by setting, such as `{"data.root": "SHARDS"}`.
    """
    text = str(message)
    for setting, argument in arguments.items():
        text = re.sub(rf"(?<![\w./]){re.escape(setting)}(?![\w]|\.\w)", argument, text)
    return text


@contextlib.contextmanager
def raise_parse_errors(prefix: str) -> Generator[None]:
    """Context in which a `CommandParser` raises UserError for an invalid command line instead of exiting.

    Args:
        prefix: beginning of the message, such as the name of the program.
    """
    token = _raised_prefix.set(prefix)
    try:
        yield
    finally:
        _raised_prefix.reset(token)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorator of the main function of a command, which then returns exit status 130 after Ctrl-C.

    Args:
        main: takes the arguments, those of the process if None, and returns the exit status.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print(f"\ninterrupted (exit status {EXIT_CTRL_C})", file=sys.stderr)
            return EXIT_CTRL_C

    return run


def exit_with_error(error: UserError, program: str, arguments: Mapping[str, str] | None = None) -> int:
    """Print an error message to stderr and return exit status 1.

    Args:
        error: the error.
        program: name of the program.
        arguments: argument of the program by setting, see `name_arguments`.
    """
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 prints an error that all ranks have, and the launcher then ends the other ranks. After this delay the
        # error is specific to this rank.
        time.sleep(3)
    print(f"{program}: {name_arguments(error, arguments or {})}", file=sys.stderr)
    return 1


def finite_float(text: str) -> float:
    """Return the number that an argument gives; as `type` of an argument, which rejects nan and infinity.

    Raises:
        argparse.ArgumentTypeError: if the text is not a finite number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}': allowed: a finite number.")
    return value


def check_minimums(options: argparse.Namespace, **minimums: int) -> None:
    """Check that options are not below their minimum, which is given by the name of the option.

    Raises:
        UserError: naming the option, its value and what is allowed.
    """
    for name, minimum in minimums.items():
        value = getattr(options, name)
        if value < minimum:
            raise UserError(f"--{name.replace('_', '-')}={value}: allowed: {minimum} or more.")


def check_parent_dirs(options: argparse.Namespace, *names: str) -> None:
    """Check that the directories of output files exist, before a command computes what it writes there.

    Raises:
        UserError: naming the option and the directory.
    """
    for name in names:
        path: Path | None = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            option = f"--{name.replace('_', '-')}={path}"
            raise UserError(f"{option}: the directory {path.parent} does not exist; create it first.")


RANK_ARGUMENTS = {
    "run.device": "--device",
    "run.timeout_s": "--timeout-s",
    "run.threads_per_rank": "--threads",
}
"""Options of `add_rank_options` by setting, for error messages."""


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
    add("--timeout-s", type=finite_float, default=3600.0, help="seconds to wait for another rank (%(default)g)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # Added by the launcher.
