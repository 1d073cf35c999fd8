"""An S3 server on this machine, in a process of its own (moto), and a proxy before it that injects
faults; and a few lines that answer as Google Cloud does."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

_SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(10**6)
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a bucket; the environment names the server, as users name theirs."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        # Moto prints as well.
        port = next(line for line in process.stdout if line.strip().isdigit()).strip()
        endpoint = f"http://127.0.0.1:{port}"
        request = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
        urllib.request.urlopen(request).close()
        settings = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        with patch.dict(os.environ, settings):
            yield "s3://bucket"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Of connections that wait to be accepted; others are made again after a second.
    request_queue_size = 256


# What a proxy does with a request: an answer of the server instead (500, 503), the connection cut
# before the server sees it, after that (lost), or in the middle of the body (half), a body without
# its last bytes (short), no answer for three seconds (hang).
FAULTS = ("503", "500", "cut", "lost", "half", "short", "hang")


@contextmanager
def faults(
    decide: Callable[[str, str], str | None] = lambda *_: None, delay: float = 0.0
) -> Iterator[list[str]]:
    """Put a proxy before the server that the environment names.

    Args:
        decide: given method and path, one of FAULTS, or "unconditional" for a server that
            disregards conditions, or None.
        delay: seconds that every request takes longer.

    Yields:
        the faults that were injected, while they are.
    """
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc
    injected: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(delay)
            if fault := decide(self.command, self.path):
                injected.append(fault)
            if fault in ("500", "503"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault in ("cut", "hang"):
                time.sleep(3 if fault == "hang" else 0)
                self.cut()
                return
            connection = HTTPConnection(server)
            headers = dict(self.headers)
            if fault == "unconditional":
                headers = {n: v for n, v in headers.items() if not n.lower().startswith("if-")}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault == "lost":
                self.cut()
                return
            if fault == "short":
                content = content[:-7]
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            if answer.status != 304:
                self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(content[: len(content) // 2] if fault == "half" else content)
            if fault == "half":
                self.cut()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def cut(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    proxy = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{proxy.server_address[1]}"
        with patch.dict(os.environ, {"AWS_ENDPOINT_URL": address}):
            yield injected
    finally:
        proxy.shutdown()
        proxy.server_close()


@contextmanager
def google_server(folder: Path) -> Iterator[str]:
    """The URL of a bucket of Google Cloud's. A file's version is its generation, and a condition
    names that: the answer to a write with another one is 412.

    Args:
        folder: for the file of credentials.
    """
    files: dict[str, tuple[bytes, int]] = {}
    generations, lock = itertools.count(1000), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, code: int, content: bytes = b"", generation: int = 0) -> None:
            self.send_response(code)
            self.send_header("ETag", f'"{generation}"')
            self.send_header("x-goog-generation", str(generation))
            self.send_header("Last-Modified", "Mon, 30 Nov 2026 10:00:00 GMT")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            wanted, key = self.headers.get("x-goog-if-generation-match"), self.path
            with lock:
                _, known = files.get(key, (b"", 0))
                if wanted is not None and wanted != str(known):
                    self.answer(412)
                    return
                files[key] = content, next(generations)
            self.answer(200, b"", files[key][1])

        def do_GET(self) -> None:
            found = files.get(self.path)
            self.answer(200, *found) if found else self.answer(404)

        def do_DELETE(self) -> None:
            files.pop(self.path, None)
            self.answer(204)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    account = {
        "gcs_base_url": f"http://127.0.0.1:{server.server_address[1]}", "disable_oauth": True,
        "client_email": "", "private_key": "", "private_key_id": "",
    }  # fmt: skip
    (folder / "account.json").write_text(json.dumps(account))
    try:
        with patch.dict(os.environ, {"GOOGLE_SERVICE_ACCOUNT": str(folder / "account.json")}):
            yield "gs://bucket"
    finally:
        server.shutdown()
        server.server_close()
