"""A server in a process of its own, on a socket: signals, slow clients, bodies beyond the limit."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import waiting
from tests.unit.tiny_learner import Models

KEY = {"X-API-Key": "tml-one"}


@pytest.fixture
def server(tiny_model: Models, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    log = tmp_path / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "tests.unit.serve.server_process", str(tiny_model(True)), str(tmp_path)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        find = re.compile(r"TINKER_BASE_URL=(\S+)")
        found = waiting.until(lambda: find.search(log.read_text()), "the server's address", process=process)
        assert found is not None
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def post(url: str, path: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/api/v1/{path}", json=body, headers=KEY, timeout=60, **more)


def test_slow_clients_hold_up_nobody_and_a_large_body_is_refused_before_it_is_read(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    _, url = server
    host, port = url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(300)]
    head = "POST /api/v1/asample HTTP/1.1\r\nHost: x\r\nX-API-Key: k\r\nContent-Length: 1000\r\n\r\n{"
    for connection in slow[:200]:
        connection.sendall(head.encode())
    for _ in range(20):  # half of the time that the server gives a slow body
        assert httpx.get(f"{url}/api/v1/healthz", timeout=30).status_code == 200
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.replace("1000", str(2**30)).encode())
        answer = answer_of(connection)
        assert answer.startswith("HTTP/1.1 413") and "limits.body_bytes" in answer
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.replace("Content-Length: 1000", "Transfer-Encoding: chunked").encode()[:-1])
        sent = 0
        with suppress(OSError):  # the server answers and closes
            for _ in range(200):
                connection.sendall(chunk)
                sent += 1
        assert sent < 200 and answer_of(connection)[:12] in ("HTTP/1.1 413", "")
    for connection in slow:
        connection.close()


def answer_of(connection: socket.socket) -> str:
    """What the server sends until it closes; empty if it reset the connection."""
    found = b""
    with suppress(OSError):
        while part := connection.recv(4096):
            found += part
    return found.decode()
