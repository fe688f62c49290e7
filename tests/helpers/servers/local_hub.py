"""A model hub on 127.0.0.1, and ways in which hubs and networks fail. What it was asked stands in its lists."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee"


class Hub(ThreadingHTTPServer):
    """`org/name` with `files`. What goes wrong is set on it, at any time."""

    daemon_threads = True
    # Of connections that wait to be accepted. Eight threads ask at once; beyond the default of 5 the kernel drops a
    # handshake whose client takes itself for connected, and its request is heard only when it has given up: after 30 s.
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = dict(files)
        self.sha256: dict[str, str] = {}  # what the hub says of a file's content
        self.failures: list[int] = []  # statuses of the next answers; 0 for a right one
        self.refuse: Callable[[str], tuple[int, dict[str, str]] | None] = lambda path: None  # status and headers
        self.body = b"busy"  # of what is refused
        self.ignores_ranges = False
        self.cut: Callable[[str, int], int | None] = lambda file, start: None  # bytes after which it hangs up
        # Another answer to a file's bytes from `start` on: status, body, headers; without a length it ends the connection.
        self.odd: Callable[[str, int], tuple[int, bytes, dict[str, str]] | None] = lambda file, start: None
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str | None]] = []  # file, Range
        self.served: list[int] = []
        self.authorized: list[tuple[str, str | None]] = []

    def fetched(self) -> set[str]:
        """Files of which at least a byte was asked for."""
        return {file for file, _ in self.ranges}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no fault."""


class Answers(BaseHTTPRequestHandler):
    """Imitates three endpoints of the Hub: model info, resolve (a redirect), and the storage behind it."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        server.requests.append(self.path)
        server.authorized.append((self.path, self.headers.get("Authorization")))
        if server.failures and (status := server.failures.pop(0)):
            return self.answer(status, server.body)
        refused = server.refuse(path)
        if refused is not None:
            return self.answer(refused[0], server.body, refused[1])
        if found := re.fullmatch(r"/api/models/org/name/revision/(main|v1|c0ffee)", path):
            siblings = [self.describe(file, raw) for file, raw in server.files.items()]
            return self.answer(200, json.dumps({"sha": COMMIT, "siblings": siblings}).encode())
        if found := re.fullmatch(r"/org/name/resolve/c0ffee/(.+)", path):
            return self.answer(302, b"", {"Location": f"/storage/{found[1]}"})
        file = path.removeprefix("/storage/")
        raw = server.files.get(file)
        if not path.startswith("/storage/") or raw is None:
            return self.answer(404, b"no such thing")
        asked = self.headers.get("Range")
        server.ranges.append((file, asked))
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        odd = server.odd(file, int(span[1]) if span else 0)
        if odd is not None:
            return self.answer(*odd)
        if not span or server.ignores_ranges:
            return self.answer(200, raw, cut=server.cut(file, 0))
        start, stop = int(span[1]), min(int(span[2] or len(raw)) + bool(span[2]), len(raw))
        if start >= len(raw):
            return self.answer(416, b"")
        where = {"Content-Range": f"bytes {start}-{stop - 1}/{len(raw)}"}
        return self.answer(206, raw[start:stop], where, server.cut(file, start))

    def describe(self, file: str, raw: bytes) -> dict[str, object]:
        more = {"lfs": {"sha256": self.server.sha256[file]}} if file in self.server.sha256 else {}
        return {"rfilename": file, "size": len(raw)} | more

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        body = body if cut is None else body[:cut]
        for i in range(0, len(body), 4096):
            try:
                self.server.served.append(self.wfile.write(body[i : i + 4096]))
            except OSError:
                return
        if cut is not None or (headers or {}).get("Content-Length") == "":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(5)
