"""What Ray's daemons report while a command is connected."""

import sys
import threading
from contextlib import redirect_stdout

from fpocli.system.ray_connection import _REPORTER, _Reports

REPORT = "\x1b[33m(raylet)\x1b[0m Raylet is terminated. Last lines of the logs:\n  [state-dump] 1\n"


def report():
    for text in (REPORT, "\n", "(raylet) Raylet is terminated. Last lines of the logs:", "\n"):
        print(text, end="")


def test_the_first_line_of_a_report_is_a_message_once(capsys):
    with redirect_stdout(_Reports()):
        thread = threading.Thread(target=report, name=_REPORTER)
        thread.start()
        thread.join()
        print("of this thread")
        sys.stdout.flush()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Ray: Raylet is terminated. Last lines of the logs:\nof this thread\n"
