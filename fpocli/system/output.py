"""How messages are written: as text, as JSON lines (--json-logs), or errors alone (--quiet)."""

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass
class Output:
    """What the command line asks for.

    Args:
        quiet: only warnings and errors.
        json_logs: each message is a JSON object on a line of stderr.
    """

    quiet: bool = False
    json_logs: bool = False

    def flags(self) -> list[str]:
        """The flags that make another fpo process write in the same way."""
        return ["--quiet"] * self.quiet + ["--json-logs"] * self.json_logs


output = Output()


def write_json(event: str, **values: Any) -> None:
    """Write one line to stderr: the time, the kind of event, and its values."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    # One write, so that the lines of several processes do not mix.
    sys.stderr.write(json.dumps({"time": time, "event": event} | values) + "\n")
    sys.stderr.flush()
