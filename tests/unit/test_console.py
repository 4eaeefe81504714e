"""Tables and progress in terminals, pipes and files."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distav import console
from distav.console import Styled, format_duration, format_entries, format_table, is_terminal, show_progress
from tests.conftest import ROOT
from tests.helpers.terminal import run_python

LONG = "a very long name of a class " * 9
NAMES = ["[red]x[/red]", "a[b]", ":smile: [/]", LONG.strip(), "犬の声"]
TABLE = f"""
from distav.console import Styled, format_entries, format_table
names = {NAMES!r}
print(format_table(("class", "clips", "%"), [(name, 7, 12.345) for name in names]))
print(format_entries("Done [b]all[/b]", [("Labels [i]", names[0]), ("Path", names[3])]))
print(format_table(("outcome",), [(Styled("FAILED", "bold red"),)]))
"""
PROGRESS = """
import sys, time
from distav.console import show_progress
with show_progress(40, "clips", "encoding [red]a[b][/red]", done=10{options}) as counter:
    for index in range(30):
        counter.advance()
        if index == 15:
            time.sleep(0.6)
            print("a line [x] on stdout")
            print("a line on stderr", file=sys.stderr)
print("the end")
"""
COLOR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38;[25]|9[0-7])[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def test_a_table_in_a_file_has_complete_names_and_no_control_characters(tmp_path: Path):
    file = tmp_path / "table.txt"
    environment = {**os.environ, "COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    with open(file, "w") as stdout:
        subprocess.run([sys.executable, "-c", TABLE], stdout=stdout, check=True, env=environment, cwd=ROOT)
    content = file.read_text()
    assert "\x1b" not in content and "\r" not in content
    lines = content.splitlines()
    for name, line in zip(NAMES, lines[1:], strict=False):
        assert line.startswith(name) and line.endswith("7  12.3") and line == line.rstrip()
    assert lines[0].split() == ["class", "clips", "%"]
    assert lines[6:9] == ["Done [b]all[/b]", f"  Labels [i]: {NAMES[0]}", f"  Path:       {NAMES[3]}"]
    assert lines[-1] == "FAILED"


def test_a_table_in_a_terminal_has_its_width_and_all_of_its_text():
    output = run_python(TABLE, columns=50)["terminal"]
    assert "\x1b[1mclass" in output and "\x1b[1;31mFAILED" in output
    text = ESCAPE.sub("", output)
    assert all(len(line.rstrip()) <= 50 for line in text.splitlines())
    assert all(name in text for name in NAMES[:3])
    numbers = re.compile(r"7 +12\.3")
    assert len(numbers.findall(text)) == 5
    words = "".join(numbers.sub("", text).split())
    assert words.count("averylongnameofaclass") == 2 * 9


@pytest.mark.parametrize(("variables", "bold"), [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)])
def test_terminals_without_colors_are_respected(variables: dict[str, str], bold: bool):
    output = run_python(TABLE, **variables)["terminal"]
    assert not COLOR.search(output) and ("\x1b[1m" in output) == bold
    if not bold:
        assert "\x1b" not in output


def test_progress_in_a_terminal_is_a_bar_below_the_lines():
    output = run_python(PROGRESS.format(options=""))["terminal"]
    bars = [ESCAPE.sub("", bar) for bar in re.split(r"[\r\n]", output) if "clips" in bar]
    assert len(bars) > 3 and all(bar.startswith("encoding [red]a[b][/red] ") for bar in bars)
    assert re.search(r"━ 26/40 clips \(65 %\), [\d.]+ clips/s, eta 00:0\d", bars[-2])
    for line in ("a line [x] on stdout", "a line on stderr"):
        assert re.search(rf"\x1b\[2K{re.escape(line)}\n", output)
    assert "\x1b[?25l" not in output  # The cursor is not hidden.
    assert re.search(r"\x1b\[2K\r?the end\n$", output)  # The bar is erased.
    assert not COLOR.search(run_python(PROGRESS.format(options=""), NO_COLOR="1")["terminal"])


def test_lines_on_stdout_stay_there_while_a_bar_is_drawn():
    outputs = run_python(PROGRESS.format(options=""), pipes=["stdout"])
    assert outputs["stdout"] == "a line [x] on stdout\nthe end\n" and "26/40 clips" in outputs["terminal"]


@pytest.mark.parametrize(
    ("options", "pipes", "variables"),
    [
        ("", ["stdout", "stderr"], {}),
        ("", ["stderr"], {}),
        ("", [], {"TERM": "dumb"}),
        ("", [], {"RANK": "1"}),
        (", is_logged=True", ["stdout"], {}),
    ],
)
def test_no_bar_is_drawn_outside_of_terminals_and_by_other_ranks(
    options: str, pipes: list[str], variables: dict[str, str]
):
    outputs = run_python(PROGRESS.format(options=options), pipes=pipes, **variables)
    lines = "".join(outputs.values()).splitlines()
    assert sorted(lines) == ["a line [x] on stdout", "a line on stderr", "the end"]


def test_lines_of_progress_are_printed_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def lines(total: int | None = 200, **options: bool) -> list[str]:
        with show_progress(total, "clips", "encoding [b]", **options) as counter:
            for _ in range(200):
                counter.advance()
        outputs = capsys.readouterr()
        assert not outputs.out
        return outputs.err.splitlines()

    assert lines() == []  # Less than the first interval.
    monkeypatch.setattr(console, "LINE_INTERVAL_S", 0.0)
    printed = lines()
    assert len(printed) == 10 and printed[4].startswith("encoding [b]: 100/200 clips (50 %), ")
    assert re.fullmatch(r".*\), \d+ clips/s, eta 00:00", printed[4])
    assert lines(is_logged=True) == lines(None) == []
    monkeypatch.setattr(console, "LONGEST_INTERVAL_S", 0.0)
    assert len(lines()) == 200
    monkeypatch.setenv("RANK", "3")
    assert lines() == []


def _show_progress_of_a_worker(path: str) -> None:
    with open(path, "w") as sys.stderr:
        console.LONGEST_INTERVAL_S = 0.0
        with show_progress(2, "clips", "encoding") as counter:
            counter.advance()


def test_worker_processes_show_no_progress(tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(
        target=_show_progress_of_a_worker, args=(str(tmp_path / "stderr"),)
    )
    process.start()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "stderr").read_text() == ""


def test_numbers_of_finished_work_exclude_what_was_finished_before(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    work = console.WorkCounter("training", 600, "steps", 300)
    assert str(work) == "300/600 steps (50 %)"
    work.advance(30)
    now[0] += 15
    assert str(work) == "330/600 steps (55 %), 2 steps/s, eta 02:15"
    unknown = console.WorkCounter("searching", None, "clips")
    now[0] += 3723
    assert str(unknown) == "1:02:03" == format_duration(3723)


def test_cells_have_no_control_characters_and_numbers_are_right_aligned():
    head, rows = ("label", "n", "share", "text"), [("\x1b[2J\n", 5, "1.5", "1"), ("b", 12, "22.5", "22")]
    assert format_table(head, rows, numbers=("share",)).splitlines() == [
        "label   n  share  text",
        "\ufffd[2J\ufffd   5    1.5  1",
        "b      12   22.5  22",
    ]
    assert format_table(("a", "b"), []) == "a  b"
    assert format_entries("T", [("A", Styled("x", "bold"))]) == "T\n  A:          x"


def test_streams_without_a_terminal():
    class Stream:
        def isatty(self) -> bool:
            return False

    assert not is_terminal(None) and not is_terminal(Stream())  # pyright: ignore[reportArgumentType]
