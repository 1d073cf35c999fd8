"""A pseudo-terminal, and what a terminal shows after what was written to it."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from pathlib import Path

# Escape sequences: of the cursor and lines, which the live view needs; and of colours and bold.
_MOVE = re.compile(r"\x1b\[(?:(\d*)([AK])|\?25[lh])")
STYLE = re.compile(r"\x1b\[[\d;]*m")


class Terminal:
    """A pseudo-terminal whose output goes to a file.

    Args:
        file: gets everything that is written to the terminal.
        columns: of the terminal, which has 24 lines.
    """

    def __init__(self, file: Path, columns: int) -> None:
        ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.name = os.ttyname(self._theirs)
        self._thread = threading.Thread(target=self._read, args=(ours, file), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until everything is in the file, after the processes that write have ended."""
        os.close(self._theirs)
        self._thread.join()

    def _read(self, ours: int, file: Path) -> None:
        with file.open("wb", buffering=0) as written:
            try:
                while chunk := os.read(ours, 4096):
                    written.write(chunk)
            except OSError:
                pass  # the other end is closed
        os.close(ours)


def screens(written: str) -> list[list[str]]:
    """The lines of the terminal each time before the live view is erased, and at the end."""
    lines, row, column, seen, up = [""], 0, 0, [], False
    text = STYLE.sub("", written)
    while text:
        if move := _MOVE.match(text):
            if move[2] == "A":
                row -= int(move[1] or 1)
            elif move[2] == "K":
                # Erasing begins with the last line; the others follow after a move up.
                if not up:
                    seen.append([*lines])
                lines[row] = ""
            up = move[2] == "A"
            text = text[move.end() :]
            continue
        character, text = text[0], text[1:]
        assert character in "\r\n" or character.isprintable(), repr(character)
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [[line.rstrip() for line in screen if line.strip()] for screen in (*seen, lines)]
