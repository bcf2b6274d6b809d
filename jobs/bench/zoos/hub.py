"""A model hub in this process, which counts what is read of its models."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE_BYTES = 2**22


class Hub:
    """A model hub as huggingface_hub asks one, of directories on disk, with the bytes that it gave out.

    Processes find it by the environment variable HF_ENDPOINT.

    Args:
        models: The directory of each model, by its id.

    Attributes:
        url: Of the server.
        sent: Bytes of files, by file name.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.sent: dict[str, int] = {}
        self.counting = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def weight_bytes_sent(self) -> int:
        return sum(sent for name, sent in self.sent.items() if name.endswith(".safetensors"))

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/.*)?", path)
        if asked and asked[1] in self.models:
            return send_json(request, self.told(request, asked[1], asked[2]))
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if asked and asked[1] in self.models and (file := self.models[asked[1]] / asked[2]).is_file():
            return self.send_file(request, file)
        request.send_error(404, "Not Found")
        return None

    def told(self, request: BaseHTTPRequestHandler, model: str, what: str | None) -> object:
        files = sorted(path for path in self.models[model].iterdir() if path.is_file())
        if what == "tree":
            return [entry(file) for file in files]
        if what == "paths-info":
            wanted = request.rfile.read(int(request.headers["Content-Length"])).decode()
            return [entry(file) for file in files if file.name in wanted]
        return {"id": model, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}

    def send_file(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        told = file.stat()
        limits = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        start, last = (int(limits[1]), int(limits[2] or told.st_size - 1)) if limits else (0, told.st_size - 1)
        stop = min(last + 1, told.st_size)
        request.send_response(206 if limits else 200)
        request.send_header("Content-Length", str(stop - start))
        if limits:
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{told.st_size}")
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("ETag", f'"{told.st_size}-{told.st_mtime_ns}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if request.command == "HEAD":
            return
        with self.counting:
            self.sent[file.name] = self.sent.get(file.name, 0) + stop - start
        with file.open("rb") as content:
            content.seek(start)
            for begin in range(start, stop, PIECE_BYTES):
                request.wfile.write(content.read(min(PIECE_BYTES, stop - begin)))


def entry(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}


def send_json(request: BaseHTTPRequestHandler, content: object) -> None:
    body = json.dumps(content).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
