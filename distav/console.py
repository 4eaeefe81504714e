"""Tables, summaries and progress on the console, drawn by rich in terminals and written as plain text elsewhere.

Text that goes to a file or a pipe has no control characters and lines of any length, so that no name and no number is
cut or wrapped. `TERM=dumb` counts as no terminal, and `NO_COLOR` removes colors. Rich is imported when something is
drawn. Names are never read as markup.
"""

import io
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bars

LINE_INTERVAL_S, LONGEST_INTERVAL_S, LINE_FRACTION = 30.0, 300.0, 0.1
"""Without a terminal, a line of progress is printed after this fraction of the work, but not within the first interval
since the last line; after the second interval it is printed in any case."""
_REFRESHES_PER_S = 4
_UNBOUNDED = 1_000_000
"""Width of text that is not wrapped."""
_BAR_WIDTHS = (8, 40)
_NUMBERS_WIDTH = 64
"""Columns beside the bar for the description and the numbers."""
_MIN_TEXT_WIDTH = 12
"""Width from which cells with texts are continued on further lines in a terminal; those with numbers never are."""
_NAME_WIDTH = 11
"""Smallest width of the names of entries."""


@dataclass(frozen=True)
class Styled:
    """Text of a cell with a style of rich for terminals, such as `bold red`."""

    text: str
    style: str


Cell = str | int | float | Styled
"""Cell of a table; floats are shown with one decimal."""


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that can be drawn in."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def printable(text: object) -> str:
    """Return text in which characters that control a terminal are replaced."""
    return "".join(character if character.isprintable() else "\ufffd" for character in str(text))


def format_duration(seconds: float) -> str:
    """Return a duration as 1:02:03 or 02:03."""
    total = max(0, round(seconds)) if math.isfinite(seconds) else 0
    hours, rest = divmod(total, 3600)
    return (f"{hours}:" if hours else "") + f"{rest // 60:02d}:{rest % 60:02d}"


def format_table(head: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: Sequence[str] = ()) -> str:
    """Return a table for stdout; in a terminal, long cells are continued on further lines.

    Args:
        head: names of the columns.
        rows: cells. Columns of `int` and `float` are right-aligned.
        numbers: names of the columns of texts that are right-aligned as well.
    """
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.show_header, table.header_style = True, "bold"
    cells = [[_text(cell) for cell in row] for row in rows]
    for index, name in enumerate(head):
        is_number = name in numbers or all(isinstance(row[index], int | float) for row in rows)
        table.add_column(_text(name), justify="right" if is_number else "left", overflow="fold")
        if is_terminal(sys.stdout):
            width = max(cell.cell_len for cell in [_text(name), *(row[index] for row in cells)])
            table.columns[-1].min_width = width if is_number else min(width, _MIN_TEXT_WIDTH)
    for row in cells:
        table.add_row(*row)
    return _render(table)


def format_entries(title: str, entries: Sequence[tuple[str, Cell]]) -> str:
    """Return a title and named texts for stdout, one below the other and indented.

    Args:
        title: first line.
        entries: name and text of each entry.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="bold", min_width=_NAME_WIDTH)
    table.add_column(overflow="fold")
    for name, text in entries:
        table.add_row(_text(name + ":"), _text(text))
    return _render(Group(Text(printable(title), "bold", overflow="fold"), Padding(table, (0, 0, 0, 2), expand=False)))


def styled(text: str, style: str) -> str:
    """Return a line of text for stdout in a style of rich, such as `bold`."""
    return _render(_text(Styled(text, style)))


def _text(cell: Cell) -> Any:
    from rich.text import Text

    if isinstance(cell, Styled):
        return Text(printable(cell.text), cell.style)
    return Text(printable(f"{cell:.1f}" if isinstance(cell, float) else cell))


def _render(renderable: "RenderableType") -> str:
    """Return what rich draws on stdout, without spaces at the end of lines."""
    in_terminal = is_terminal(sys.stdout)
    width = shutil.get_terminal_size().columns if in_terminal else _UNBOUNDED
    output = io.StringIO()
    _console(output, in_terminal, width).print(renderable, crop=False, soft_wrap=False)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _console(file: TextIO, in_terminal: bool, width: int | None = None) -> "Console":
    from rich.console import Console

    class VisibleCursorConsole(Console):
        """A console that does not hide the cursor, which a process that is killed could not show again."""

        def show_cursor(self, show: bool = True) -> bool:
            """Do nothing."""
            del show
            return False

    return VisibleCursorConsole(
        file=file,
        width=width,
        force_terminal=in_terminal,
        force_jupyter=False,
        no_color=bool(os.environ.get("NO_COLOR")),
        markup=False,
        emoji=False,
        highlight=False,
    )


class WorkCounter:
    """Work that is counted: how much is finished, at which rate, and when the rest will be.

    Attributes:
        description: what is done.
        total: amount of work; None if it is not known.
        unit: what is counted, such as `clips`.
        done: finished work.
        show: called after each change.
    """

    def __init__(self, description: str, total: int | None, unit: str, done: int = 0):
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.show: Callable[[], None] = lambda: None
        self._first, self._started = done, time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int = 1) -> None:
        """Count finished work; any thread may call this."""
        with self._lock:
            self.done += count
            self.show()

    def __str__(self) -> str:
        """Return the finished work, the rate and the time that is left; the elapsed time if the total is not known."""
        elapsed = time.monotonic() - self._started
        if self.total is None:
            return format_duration(elapsed)
        text = f"{self.done}/{self.total} {self.unit} ({100 * self.done // max(1, self.total)} %)"
        if self.done == self._first:
            return text
        rate = (self.done - self._first) / max(elapsed, 1e-9)
        rate_text = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{text}, {rate_text} {self.unit}/s, eta {format_duration((self.total - self.done) / rate)}"


class _Lines:
    """Prints lines on work to stderr, at the intervals that are described above."""

    def __init__(self, work: WorkCounter):
        self._work, self._time, self._done = work, time.monotonic(), work.done

    def __call__(self) -> None:
        work, now = self._work, time.monotonic()
        elapsed, fraction = now - self._time, (work.done - self._done) / max(1, work.total or 1)
        if elapsed >= LONGEST_INTERVAL_S or (elapsed >= LINE_INTERVAL_S and fraction >= LINE_FRACTION):
            print(f"{work.description}: {work}", file=sys.stderr, flush=True)
            self._time, self._done = now, work.done


@contextmanager
def show_progress(
    total: int | None, unit: str, description: str, *, done: int = 0, is_logged: bool = False
) -> Iterator[WorkCounter]:
    """Context that shows progress on stderr: a bar in a terminal, otherwise a line now and then.

    Only the main process of rank 0 shows something.

    Args:
        total: amount of work; None if it is not known, which shows the elapsed time in terminals.
        unit: what is counted, in the plural, such as `clips`.
        description: what is done.
        done: work that was finished before.
        is_logged: whether the caller prints lines on its progress to stdout. No other lines are then printed, and a bar
            is drawn only if stdout is a terminal as well.
    """
    work = WorkCounter(printable(description), total, printable(unit), done)
    if total == 0 or os.environ.get("RANK", "0") != "0" or multiprocessing.parent_process() is not None:
        yield work
    elif is_terminal(sys.stderr) and (is_terminal(sys.stdout) or not is_logged):
        with _bar(work):
            yield work
    else:
        if total is not None and not is_logged:
            work.show = _Lines(work)
        yield work


_bars: "Bars | None" = None
"""Bars in the terminal; those of nested contexts are drawn together."""


@contextmanager
def _bar(work: WorkCounter) -> Iterator[None]:
    """Context with a bar, which is erased at the end."""
    global _bars
    is_first = _bars is None
    bars = _bars or _new_bars()
    if is_first:
        # The thread that draws leaves Ctrl-C to the main thread, which may have to block it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        bars.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _bars = bars
    bar = bars.add_task(work.description, total=work.total, completed=work.done, work=work)
    work.show = lambda: bars.update(bar, completed=work.done)
    try:
        yield
    finally:
        if is_first:
            _bars = None
            bars.stop()
        else:
            bars.remove_task(bar)


def _new_bars() -> "Bars":
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = _console(sys.stderr, in_terminal=True)
    smallest, largest = _BAR_WIDTHS
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(max(smallest, min(largest, console.width - _NUMBERS_WIDTH)), complete_style="cyan"),
        TextColumn("{task.fields[work]}", markup=False),
        console=console,
        refresh_per_second=_REFRESHES_PER_S,
        transient=True,
        # Otherwise lines on a stdout that is no terminal would be written to stderr.
        redirect_stdout=is_terminal(sys.stdout),
    )
