"""A web server on this machine that serves a folder, badly where a test asks for it."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class BadServer:
    """What it does is set by the test: `faults` are used up, one for each request of a path."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, ""
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.pause = 0.0  # before each piece of a body
        self.closing = threading.Event()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = unquote(urlsplit(handler.path).path).lstrip("/")
        self.requests[name] += 1
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        file = self.folder / name
        if fault.isdigit() or not file.is_file():
            handler.send_response(int(fault or 404))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "hang up":
            return
        body = file.read_bytes()
        handler.send_response(200)
        if fault != "no length":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if fault in ("half", "stall"):
            handler.wfile.write(body[: len(body) // 2])
            if fault == "stall":
                self.closing.wait()
            return
        for start in range(0, len(body), 4096):
            time.sleep(self.pause)
            handler.wfile.write(body[start : start + 4096])


@contextmanager
def bad_server(folder: Path) -> Iterator[BadServer]:
    """Serve a folder at `.url` until the test ends."""
    bad = BadServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            bad.answer(self)
            self.close_connection = True

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that hung up

    with Server(("127.0.0.1", 0), Handler) as server:
        bad.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield bad
        finally:
            bad.closing.set()
            server.shutdown()
            thread.join()
