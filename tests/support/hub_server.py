"""A server that answers as the Hugging Face hub does when a repository is created and written."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_made_up"


class Hub:
    """What was pushed.

    Args:
        url: of the server.
        repositories: by kind and name, what they were created with.
        files: by kind and name, the content of the files by path.
        refuse: by path, the status that is answered instead.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[tuple[str, str], dict[str, Any]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refuse: dict[str, int] = {}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on this machine; every file is small enough for a commit."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            _, _, kinds, owner, name, *_ = self.path.split("/")
            if (kinds.removesuffix("s"), f"{owner}/{name}") not in hub.repositories:
                return self._answer(404, {"error": "Repository not found"})
            return self._answer(200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            for path, status in hub.refuse.items():
                if path in self.path:
                    return self._answer(status, {"error": "refused by the test"})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "Invalid username or password."})
            return self._post(body)

        def _post(self, body: bytes) -> None:
            if self.path == "/api/repos/create":
                about = json.loads(body)
                key = (about.get("type", "model"), f"{about['organization']}/{about['name']}")
                if key in hub.repositories:
                    url = f"{hub.url}/{key[1]}"
                    return self._answer(409, {"error": "You already created this", "url": url})
                hub.repositories[key] = about
                return self._answer(200, {"url": f"{hub.url}/{key[1]}"})
            if self.path == "/api/validate-yaml":
                front = json.loads(body)["content"].split("---\n")[1]
                found = yaml.safe_load(front)
                errors = [] if isinstance(found, dict) else [{"message": "no object"}]
                return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
            _, _, kinds, owner, name, what, *_ = self.path.split("/")
            key = (kinds.removesuffix("s"), f"{owner}/{name}")
            if what == "preupload":
                files = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
                return self._answer(200, {"files": modes})
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    content = base64.b64decode(value["content"])
                    hub.files.setdefault(key, {})[value["path"]] = content
            return self._answer(
                200,
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{hub.url}/{owner}/{name}/commit/{'1' * 40}",
                    "pullRequestUrl": None,
                },
            )

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
