"""As much of a model hub, over HTTP on this machine, as huggingface_hub needs to upload a folder and to download it."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: `server.repos` is {name: {path: bytes}}. Every file is small enough to be sent inline."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Answer what a download asks: the commit, the list of files, a file."""
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        files = self.server.repos.get(repo)
        if files is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif api and parts[4:5] == ["tree"]:
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": digest(data)} for path, data in files.items()
            ]
            self.answer(200, listed)
        elif api:
            self.answer(200, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})
        elif (path := "/".join(parts[4:])) in files:
            self.answer(200, files[path], {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self):
        """Take a commit: one JSON a line, files in base64."""
        repo = "/".join(self.path.split("/")[3:5])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            files = self.server.repos.setdefault(repo, {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"/{repo}/commit/{COMMIT}"})
        else:
            self.answer(404, {"error": f"no {self.path} here"})

    def answer(self, status, content, headers=None):
        """Send JSON, or the bytes of a file; of both only the head where that was asked."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        """Be quiet."""


def digest(data):
    """Name content as git does."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub(repos):
    """Serve repositories, which uploads change; yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = repos
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
