"""Progress on a terminal and in a log file."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from fpocli.system import console

WORK = """
import time
from fpocli.system import console
from fpocli.system.errors import UserError
console._FIRST_LINE, console._EVERY = 0.05, 0.1
try:
    with console.progress("Counting", 40) as bar:
        for number in range(40):
            time.sleep(0.01)
            bar.advance(note=f"at {number}")
            if number == 30 and FAILS:
                raise UserError("it broke")
except UserError as error:
    console.console.print(f"error: {error}")
"""


def in_a_file(fails: bool) -> list[str]:
    words = [sys.executable, "-c", WORK.replace("FAILS", str(fails))]
    return subprocess.run(words, capture_output=True, text=True, check=True).stderr.splitlines()


def on_a_terminal(fails: bool) -> str:
    """The text left on the screen of a terminal."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", WORK.replace("FAILS", str(fails))]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(words, stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:
        pass  # the other end is closed
    assert process.wait() == 0
    return written.decode()


def test_a_log_file_gets_a_plain_line_now_and_then():
    lines = in_a_file(fails=False)
    assert 3 <= len(lines) <= 8
    assert all(line.startswith("Counting: ") and line.isprintable() for line in lines)
    assert " of 40 in " in lines[0] and "s left, at " in lines[0]
    assert lines[-1].startswith("Counting: 40 of 40 in ")


def test_work_that_is_done_at_once_prints_no_line(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=written))
    with console.progress("Counting", 3) as bar:
        bar.advance(3)
    assert written.getvalue() == ""


@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_stays_on_a_terminal_unless_the_work_fails(fails):
    shown = on_a_terminal(fails)
    assert "Counting" in shown
    # The text after the line was last erased.
    left = shown.rpartition("\x1b[2K")[2]
    assert ("Counting" in left) is not fails
    assert ("error: it broke" in left) is fails


def test_no_progress_line_stands_above_an_error():
    lines = in_a_file(fails=True)
    assert lines[-1] == "error: it broke"
    assert not any("━" in line for line in lines)
