"""A hub of data sets on this machine: the few answers of huggingface.co that `datasets` asks for, over HTTP.

with LocalHub({"openai/gsm8k": {"README.md": b"...", "main/test-00000-of-00001.parquet": b"..."}}) as hub:
subprocess.run(command, env={**os.environ, "HF_ENDPOINT": hub.url})
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMIT = "a" * 40
_NOT_FOUND = b'{"error": "Entry not found"}'


class LocalHub:
    """Serves repositories, files by their paths; `asked` lists method and path of every request."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self._repositories = repositories
        self.asked: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """The body and headers of what is at a path; None where there is nothing."""
        for name, files in self._repositories.items():
            resolved, api = f"/datasets/{name}/resolve/", f"/api/datasets/{name}/"
            if path.startswith(resolved):
                found = files.get(path.removeprefix(resolved).partition("/")[2])
                return None if found is None else (found, {"ETag": f'"{_digest(found)}"', "X-Repo-Commit": COMMIT})
            if path.startswith(f"{api}revision/"):
                siblings = [{"rfilename": file} for file in files]
                return _json({"id": name, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings})
            if path.startswith(f"{api}tree/"):
                return _json(_children(files, path.removeprefix(f"{api}tree/").partition("/")[2]))
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        found = self.hub.answer(path)
        if found is None:
            self._send(404, _NOT_FOUND, {"X-Error-Code": "EntryNotFound"})
            return
        body, headers = found
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, body, headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = min(int(last or len(body)), len(body) - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{end}/{len(body)}"}
        self._send(206, body[int(first) : end + 1], headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _children(files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What lies in a folder itself, as the hub lists it."""
    start = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if path.startswith(start):
            head, slash, _ = path.removeprefix(start).partition("/")
            kind = {"type": "directory"} if slash else {"type": "file", "size": len(content)}
            found[head] = {"path": start + head, "oid": _digest(content), **kind}
    return list(found.values())


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _json(document: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(document).encode(), {"Content-Type": "application/json"}
