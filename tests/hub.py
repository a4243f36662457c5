"""A stand-in for the Hub: a server on this machine that offers folders as repositories."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path

COMMIT = "0" * 40
INFO = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?")
TREE = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?")
FILE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub and datasets ask."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):  # noqa: N802 (the name that http.server calls)
        self.do_GET()

    def do_GET(self):  # noqa: N802
        """A repository's facts, its files, or a file's content."""
        path, _, query = self.path.partition("?")
        path, root = urllib.parse.unquote(path), self.server.root
        if (asked := FILE.fullmatch(path)) and (file := root / asked[1] / asked[2]).is_file():
            body = file.read_bytes()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(body, **{"ETag": etag, "X-Repo-Commit": COMMIT})
        if (asked := TREE.fullmatch(path)) and (
            folder := root / asked[1] / (asked[2] or "")
        ).is_dir():
            files = folder.rglob("*") if "recursive=true" in query.lower() else folder.iterdir()
            return self.answer([_entry(root / asked[1], file) for file in sorted(files)])
        if (asked := INFO.fullmatch(path)) and (root / asked[1]).is_dir():
            files = [file for file in (root / asked[1]).rglob("*") if file.is_file()]
            names = [{"rfilename": _entry(root / asked[1], file)["path"]} for file in sorted(files)]
            return self.answer({"id": asked[1], "sha": COMMIT, "siblings": names, "tags": []})
        code = "RepoNotFound" if INFO.fullmatch(path) else "EntryNotFound"
        return self.answer({}, 404, **{"X-Error-Code": code})

    def answer(self, body, code=200, **headers):
        """Send a status, headers and a body (bytes, or what becomes JSON)."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(root: Path, file: Path) -> dict:
    name = file.relative_to(root).as_posix()
    if file.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT}
    digest = hashlib.sha1(file.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest}


def serve(root: Path) -> http.server.ThreadingHTTPServer:
    """A running server of root/OWNER/NAME/...; close it with shutdown()."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root = root
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
