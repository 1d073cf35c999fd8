"""A grid's `launch` for tests: its commands are real processes of fpo, forked from the server of
processes.py, which has imported everything, so that each starts in a second."""

import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread


@contextmanager
def forked_launch() -> Iterator[str]:
    """The value of `launch`; it works while the context is open."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        place = str(Path(folder) / "socket")
        server.bind(place)
        server.listen()
        Thread(target=_serve, args=(server,), daemon=True).start()
        yield shlex.join([sys.executable, __file__, place])
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket) -> None:
    from processes import Command

    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, connection.makefile("rw") as stream:
            process = Command(*json.loads(stream.readline()))
            code = process.wait(300)
            stream.write(json.dumps([code, process.data(), process.messages()]) + "\n")
            process.close()


def _main() -> None:
    place, _, _, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(place)
        with client.makefile("rw") as stream:
            stream.write(json.dumps(words) + "\n")
            stream.flush()
            code, data, messages = json.loads(stream.readline())
    os.write(1, data.encode())
    os.write(2, messages.encode())
    sys.exit(code)


if __name__ == "__main__":
    _main()
