"""A model hub in one thread: the few endpoints a download uses, over files held in memory."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "someone/tiny-kimi"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server holds, and what happened to it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut_after: int | None = None  # bytes after which a large download breaks off
        self.refuse_ranges = False  # answer a continued download with nothing
        self.ranges: list[str] = []  # Range headers that were asked for
        self.downloads: list[str] = []  # files that were sent
        self.url = ""


def _file_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _model_info(hub: Hub) -> dict[str, object]:
    siblings = []
    for name, data in hub.files.items():
        entry = _file_entry(name, data)
        sibling = {"rfilename": name, "size": len(data), "blobId": entry["oid"]}
        if "lfs" in entry:
            sibling["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        siblings.append(sibling)
    return {"id": REPO, "modelId": REPO, "sha": SHA, "private": False, "tags": [], "siblings": siblings}


class _Requests(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [{"type": "file", "path": n, **_file_entry(n, d)} for n, d in self.hub.files.items()]
            self._send(200, json.dumps(tree).encode(), with_body)
        elif path.startswith(f"/api/models/{REPO}"):
            self._send(200, json.dumps(_model_info(self.hub)).encode(), with_body)
        elif path.startswith(f"/{REPO}/resolve/{SHA}/"):
            self._send_file(path.rpartition("/")[2], with_body)
        else:
            self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, name: str, with_body: bool) -> None:
        data = self.hub.files[name]
        digest = _file_entry(name, data).get("lfs", {"oid": hashlib.sha1(data).hexdigest()})
        assert isinstance(digest, dict)
        headers = {"ETag": f'"{digest["oid"]}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if with_body:
            self.hub.downloads.append(name)
        cut = self.hub.cut_after if name.endswith(".safetensors") else None
        if cut is not None and start and self.hub.refuse_ranges:
            cut = 0
        self._send(206 if start else 200, data[start:], with_body, headers, cut)

    def _send(
        self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run a hub that holds one repository until the block ends."""
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Requests", (_Requests,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
