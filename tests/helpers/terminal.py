"""Programs in a pseudo-terminal."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

ROWS = 40


def run_python(code: str, columns: int = 100, pipes: Sequence[str] = (), **variables: str) -> dict[str, str]:
    """Run a Python program whose stdout and stderr are one terminal; return what each stream got.

    Args:
        code: the program.
        columns: width of the terminal.
        pipes: `stdout`, `stderr` or both: streams that are pipes instead.
        variables: environment variables; empty ones are removed.

    Returns:
        Output by the names of `pipes`, and that of the terminal as `terminal`, in which lines end with a newline.
    """
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "", **variables}
    environment = {name: value for name, value in environment.items() if value}
    main_end, program_end = pty.openpty()
    fcntl.ioctl(program_end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    streams = {name: subprocess.PIPE if name in pipes else program_end for name in ("stdout", "stderr")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=program_end, cwd=Path(__file__).parents[2], **streams
    )
    os.close(program_end)
    content = b""
    with contextlib.suppress(OSError):  # The end of the output of a terminal is an error.
        while part := os.read(main_end, 65536):
            content += part
    os.close(main_end)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, content.decode() + (stderr or b"").decode()
    outputs = {"terminal": content, "stdout": stdout, "stderr": stderr}
    return {name: output.decode().replace("\r\n", "\n") for name, output in outputs.items() if output is not None}
