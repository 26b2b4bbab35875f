"""As much of the Hugging Face Hub as loading a data set asks for: repositories, each read from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1".zfill(40)


@contextmanager
def fake_hub(folders: Mapping[str, Path]) -> Iterator[str]:
    """The address at which these data sets are served, each from its folder; any other is not found."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            named = [each for each in folders if path.startswith((f"/api/datasets/{each}", f"/datasets/{each}/"))]
            if not named:
                self.answer(b"{}", 404, "RepoNotFound")
                return
            (name,) = named
            folder, api, files = folders[name], f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": entry["path"]} for entry in entries(folder)]
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"{api}/tree/"):
                self.answer(json.dumps(entries(folder)).encode())
            elif path.startswith(files):
                self.answer_file(folder / path.removeprefix(files).partition("/")[2])
            else:
                self.answer(b"{}", 404, "RepoNotFound")

        do_HEAD = do_GET

        def answer_file(self, path: Path) -> None:
            if path.is_file():
                self.answer(path.read_bytes())
            else:
                self.answer(b"{}", 404, "EntryNotFound")

        def answer(self, body: bytes, status: int = 200, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def entries(folder: Path) -> list[dict[str, object]]:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in found
        ]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
