"""Progress on a terminal and in a log file."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from terminal import STYLE, Terminal, screens

from fpocli.system import bar as bars
from fpocli.system import console

WORK = """
import time
from fpocli.system import console
from fpocli.system.errors import UserError
console._FIRST_LINE, console._EVERY = 0.05, 0.1
try:
    with console.progress("Counting", 60, 20) as bar:
        for number in range(40):
            time.sleep(0.01)
            bar.advance(tokens=50)
            bar.show({"loss": 40 - number, "D": 0.5})
            if number == 30:
                console.say("half way")
                time.sleep(0.4)
                if FAILS:
                    raise UserError("it broke")
except UserError as error:
    console.show_error(str(error), "mend it")
"""


def words(fails: bool) -> list[str]:
    return [sys.executable, "-c", WORK.replace("FAILS", str(fails))]


def in_a_file(fails: bool, **environment: str) -> str:
    done = subprocess.run(
        words(fails), capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stderr


def on_a_terminal(fails: bool, file: Path, columns: int = 80, **environment: str) -> str:
    """What is written to a terminal."""
    terminal = Terminal(file, columns)
    with open(terminal.name, "wb") as stderr:  # noqa: PTH123
        # The width is the terminal's.
        inherited = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES")}
        settings = inherited | {"TERM": "xterm"} | environment
        subprocess.run(words(fails), stderr=stderr, check=True, env=settings)
    terminal.close()
    return file.read_bytes().decode()


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_a_log_file_gets_a_plain_line_now_and_then(environment):
    lines = in_a_file(fails=False, **environment).splitlines()
    lines.remove("half way")
    assert 3 <= len(lines) <= 8
    assert all(line.startswith("Counting: ") and line.isprintable() for line in lines)
    assert " of 60 in " in lines[0] and " tokens/s, loss " in lines[0]
    assert " s left, " in lines[0] and lines[0].endswith(", D 0.5")
    assert lines[-1].startswith("Counting: 60 of 60 in ") and "loss 1," in lines[-1]


def test_work_that_is_done_at_once_prints_no_line(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "_stderr", lambda: Console(file=written))
    with console.progress("Counting", 3) as bar:
        bar.advance(3)
    assert written.getvalue() == ""


def test_the_last_line_has_the_last_values(monkeypatch):
    """Also where a line is due between the last unit and its values."""
    written = io.StringIO()
    monkeypatch.setattr(console, "_stderr", lambda: Console(file=written, soft_wrap=True))
    monkeypatch.setattr(console, "_FIRST_LINE", 0)
    with console.progress("Counting", 1) as bar:
        bar.advance(1)
        bar.show({"loss": 0.5})
    first, last = written.getvalue().splitlines()
    assert "loss" not in first and last.endswith("loss 0.5")


@pytest.mark.parametrize("columns", [80, 30])
@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_stays_on_a_terminal_unless_the_work_fails(fails, columns, tmp_path):
    *before, left = screens(on_a_terminal(fails, tmp_path / "written", columns))
    # While the work waits at its 31st unit.
    view = before[-1] if fails else next(one for one in before if "half way" in one)
    first, head, rates, loss, distance = view
    assert first == "half way" and "Counting" in head and "/60" in head and " left" in head
    assert rates.split()[1] == "tokens/s"
    assert loss.split()[0::2] == ["loss", "10"]
    assert loss.split()[1].startswith("█") and loss.split()[1].endswith("▁")
    assert set(distance.split()[1]) == {"▄"}
    assert all(len(line) <= columns for screen in before for line in screen)
    if fails:
        assert left == ["half way", "error: it broke", "hint: mend it"]
    else:
        assert [line.split()[0] for line in left[:2]] == ["half", "Counting"]
        assert len(left) == 3 and left[2].endswith(" tokens/s") and "left" not in left[1]


@pytest.mark.parametrize("columns", [1, 8, 20])
def test_the_narrowest_terminal_breaks_nothing(columns, tmp_path):
    screens(on_a_terminal(False, tmp_path / "written", columns))


def test_no_color_leaves_the_movements_of_the_cursor_alone(tmp_path):
    """Also bold, which rich keeps."""
    coloured = on_a_terminal(True, tmp_path / "written", NO_COLOR="")
    assert "\x1b[1;31merror: " in coloured
    plain = on_a_terminal(True, tmp_path / "written", NO_COLOR="1")
    assert not STYLE.search(plain) and "\x1b[2K" in plain


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_holds_for_tables(no_color, tmp_path):
    """Those on stdout, where a terminal gets bold text."""
    terminal = Terminal(tmp_path / "written", 80)
    show = "from fpocli.system.console import data_console as out; out().print('a', style='bold')"
    with open(terminal.name, "wb") as stdout:  # noqa: PTH123
        settings = os.environ | {"TERM": "xterm", "NO_COLOR": no_color}
        subprocess.run([sys.executable, "-c", show], stdout=stdout, check=True, env=settings)
    terminal.close()
    written = (tmp_path / "written").read_bytes().decode()
    assert written == ("a\r\n" if no_color else "\x1b[1ma\x1b[0m\r\n")


def test_a_terminal_without_a_cursor_gets_lines(tmp_path):
    written = on_a_terminal(True, tmp_path / "written", TERM="dumb")
    assert "\x1b" not in written and "Counting: " in written


def test_no_progress_line_stands_above_an_error():
    text = in_a_file(fails=True)
    assert text.splitlines()[-2:] == ["error: it broke", "hint: mend it"]
    assert "━" not in text


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left(clock):
    """Of a resumed run: what an earlier command did says nothing about the speed."""
    bar = bars.Bar("Training", 100, done=60)
    assert bar.left is None and bar.rate == 0 and bar.rates == {}
    clock[0] = 10.0
    bar.advance(5)
    bar.advance(0, pairs=40, tokens=3000)
    assert bar.rate == 0.5 and bar.left == 70
    assert bar.rates == {"pairs": 4, "tokens": 300}
    # In the middle of a step, whose pairs are not counted yet.
    clock[0] = 11.0
    assert bar.left == 69
    bar.advance(0.5)
    assert bar.rates == {"pairs": 4, "tokens": 300}
    clock[0] = 1000.0
    assert bar.left == 0
    bar.advance(34.5)
    assert bar.left is None


def test_fractions_of_a_unit_add_up():
    bar = bars.Bar("Training", 500)
    for _ in range(500):
        for _ in range(7):
            bar.advance(1 / 7)
    assert bar.done == 500 and bar.left is None


def test_times_and_numbers_for_people():
    times = [bars.duration(seconds) for seconds in (0.4, 119, 120, 3569, 3570, 11_100, 360_000)]
    expected = ["0 s", "119 s", "2 min", "59 min", "1 h 00 min", "3 h 05 min", "100 h 00 min"]
    assert times == expected
    numbers = [bars.number(value) for value in (12_345.6, -1000, 3.2512, 1.2e-5, 0)]
    assert numbers == ["12,346", "-1,000", "3.251", "1.2e-05", "0"]
