"""What Ray's daemons report while a command is connected."""

import sys
import threading
from contextlib import redirect_stdout

from fpocli.system.ray_connection import _Reports

REPORTS = (
    "\x1b[33m(raylet)\x1b[0m Raylet is terminated. Last lines:\n  [state-dump] 1\n",
    "(raylet, ip=192.0.2.2) Raylet is terminated. Last lines:\n  [state-dump] 2\n",
    "\x1b[36m(raylet)\x1b[0m A worker died.",
)


def report():
    """As Ray does: in a thread of its own, and when it shuts down in the main one."""
    for text in REPORTS:
        print(text)


def test_the_first_line_of_a_report_is_a_message_once(capsys):
    with redirect_stdout(_Reports()):
        thread = threading.Thread(target=report)
        thread.start()
        thread.join()
        report()
        print("of this thread")
        print()
        sys.stdout.flush()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "Ray: Raylet is terminated. Last lines:\nRay: A worker died.\nof this thread\n\n"
    )
