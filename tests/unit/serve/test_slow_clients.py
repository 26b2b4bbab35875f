"""Clients that are slow in every way, beside one that works: closed after their time, and it does not wait for them."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests import waiting
from tests.forked import forked
from tests.unit.serve.certificates import issue, write
from tests.unit.serve.http_client import datum
from tests.unit.tiny_learner import Models

KEY = "tml-0123456789"
KEYS = {"X-API-Key": KEY}
SECONDS = {"slow_header_s": 2, "slow_body_s": 3, "slow_read_s": 2}
SERVER = "import runpy; runpy.run_module('tests.unit.serve.server_process', run_name='__main__')"
READERS, LARGE = 8, 16_000_000  # clients that do not read, and bytes of an answer that no socket buffers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(tiny_model: Models, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and its process."""
    root = issue("root")
    issued = issue("server", root)
    certificate, key = write(folder, issued.pem, issued.key_pem())
    (folder / "root.pem").write_bytes(root.pem)
    (folder / "keys").touch(mode=0o600)
    (folder / "keys").write_text(f"{KEY} one\n")
    overrides = [f"bind.tls_certificate={certificate}", f"bind.tls_key={key}", f"keys={folder / 'keys'}"]
    overrides += [f"limits.{name}={value}" for name, value in {**SECONDS, "header_bytes": 8192}.items()]
    overrides += [
        "limits.connections=700",
        "limits.connections_per_address=500",
        "limits.metadata_bytes=20000000",
        "limits.call_bytes=20000000",
    ]
    find = re.compile(r"TINKER_BASE_URL=(\S+)")

    def log() -> str:
        files = [folder / name for name in ("stdout", "stderr")]
        return "".join(file.read_text() for file in files if file.exists())

    with forked(SERVER, str(tiny_model(True)), str(folder), *overrides, folder=folder) as process:
        waiting.until(lambda: find.search(log()) or not process.is_alive(), "the server's address", state=log)
        found = find.search(log())
        assert found is not None, log()
        yield found[1], psutil.Process(process.pid)
        assert KEY not in log() and "Traceback" not in log(), log()


@pytest.fixture(scope="module")
def url(server: tuple[str, psutil.Process]) -> str:
    return server[0]


@pytest.fixture(scope="module")
def trust(url: str, folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / "root.pem"))


def connect(url: str, trust: ssl.SSLContext, receive: int | None = None) -> ssl.SSLSocket:
    where, plain = urlsplit(url), socket.socket()
    if receive is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    plain.settimeout(60)
    plain.connect((where.hostname, where.port))
    return trust.wrap_socket(plain, server_hostname="127.0.0.1")


def beginning(url: str, trust: ssl.SSLContext, first: bytes) -> ssl.SSLSocket:
    """A connection that has sent no more than this."""
    connection = connect(url, trust, receive=4096)
    connection.sendall(first)
    return connection


def head(path: str, *more: str, method: str = "POST") -> bytes:
    lines = (f"{method} /api/v1/{path} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {KEY}", *more)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer_of(connection: socket.socket) -> str:
    """What the server sends until it closes."""
    found = b""
    with suppress(OSError):
        while part := connection.recv(65536):
            found += part
    return found.decode()


def test_the_server_speaks_tls_with_the_certificate_of_its_configuration(url: str, trust: ssl.SSLContext) -> None:
    assert url.startswith("https://127.0.0.1:")
    with httpx.Client(verify=trust, headers=KEYS) as client:
        assert client.get(f"{url}/api/v1/sessions").json() == {"sessions": []}
    with pytest.raises(httpx.HTTPError):
        httpx.get(url.replace("https", "http") + "/api/v1/healthz")


@pytest.mark.parametrize("number", [40, pytest.param(300, marks=pytest.mark.soak)])
def test_slow_clients_of_four_kinds_hold_up_nobody_and_are_closed(number: int, url: str, trust: ssl.SSLContext) -> None:
    with httpx.Client(verify=trust, headers=KEYS, base_url=f"{url}/api/v1/", timeout=60) as client:
        large = {"user_metadata": {"a": "x" * LARGE}}
        session = client.post("create_session", json=large).json()["session_id"]
        alone = statistics.median(worked(client) for _ in range(5))
        began = time.monotonic()
        headers, bodies, silent, readers = [
            [beginning(url, trust, first) for _ in range(count)]
            for first, count in (
                (b"POST /api/v1/asample HTTP/1.1\r\nX-API-", number // 3),
                (head("asample", "Content-Length: 1000") + b"{", number // 3),
                (b"", number // 3 - READERS),
                (head(f"sessions/{session}", method="GET"), READERS),  # an answer that is not read
            )
        ]
        beside = statistics.median(worked(client) for _ in range(10))
        assert beside < 3 * alone + 0.25 * waiting.slowdown(), (alone, beside)
        while time.monotonic() - began < 8:  # some keep their connection busy, byte by byte
            if time.monotonic() - began < min(SECONDS.values()):  # later the server has answered
                for connection in (*headers, *bodies):
                    connection.sendall(b"x")
            time.sleep(0.5)
            assert client.get("healthz").status_code == 200
        assert all("limits.slow_body_s" in answer_of(each) for each in bodies)
        assert {answer_of(each) for each in (*headers, *silent)} == {""}
        assert all(len(answer_of(each)) < LARGE for each in readers), "an answer was sent to its end"
        for connection in (*headers, *bodies, *silent, *readers):
            connection.close()
        assert worked(client) < 60


def worked(client: httpx.Client) -> float:
    """Seconds of a pass of a training run, from its session to its result."""
    began = time.monotonic()
    session = client.post("create_session", json={}).json()["session_id"]
    create = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    made = client.post("create_model", json=create).json()["request_id"]
    model = client.post("retrieve_future", json={"request_id": made}).json()["model_id"]
    inputs = {"data": [datum(5)], "loss_fn": "cross_entropy"}
    call = {"model_id": model, "seq_id": 1, "forward_backward_input": inputs}
    promise = client.post("forward_backward", json=call).json()["request_id"]
    assert "loss:sum" in client.post("retrieve_future", json={"request_id": promise}).json()["metrics"]
    client.post(f"sessions/{session}/finish", json={})
    return time.monotonic() - began


def flood(url: str, trust: ssl.SSLContext, first: bytes, part: bytes) -> tuple[int, str]:
    """(bytes that the server took, its answer) of a request that never ends."""
    with closing(connect(url, trust)) as connection:
        sent = 0
        with suppress(OSError):
            connection.sendall(first)
            while sent < 64 * 2**20:
                connection.sendall(part)
                sent += len(part)
        return sent, answer_of(connection)


FLOODS = {
    "one header": (b"GET /api/v1/healthz HTTP/1.1\r\nX: ", b"x" * 16384),
    "headers": (b"GET /api/v1/healthz HTTP/1.1\r\n", b"X: y\r\n" * 2000),
    "target": (b"GET /api/v1/", b"x" * 16384),
    "method": (b"", b"A" * 16384),
    "chunk extension": (head("asample", "Transfer-Encoding: chunked") + b"1;", b"x" * 16384),
    "trailer": (head("asample", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\nX: ", b"x" * 16384),
    "trailers": (head("asample", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 2000),
    "declared size": (head("asample", f"Content-Length: {2**30}"), b"x" * 16384),
    "chunks": (head("asample", "Transfer-Encoding: chunked"), b"4000\r\n" + b"x" * 0x4000 + b"\r\n"),
    "chunks of healthz": (
        b"POST /api/v1/healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"4000\r\n" + b"x" * 0x4000 + b"\r\n",
    ),
}


@pytest.mark.parametrize(("first", "part"), FLOODS.values(), ids=FLOODS)
def test_a_request_without_an_end_is_cut_off_and_not_kept(
    first: bytes, part: bytes, server: tuple[str, psutil.Process], trust: ssl.SSLContext
) -> None:
    url, process = server
    before = process.memory_info().rss
    sent, answer = flood(url, trust, first, part)
    assert answer == "" or re.match(r"HTTP/1.1 4(00|13|31) ", answer), (sent, answer[:200])
    grown = process.memory_info().rss - before
    assert grown < 24 * 2**20, f"the server holds {grown / 2**20:.0f} MiB of {sent / 2**20:.0f} MiB"
    assert httpx.get(f"{url}/api/v1/healthz", verify=trust).status_code == 200


def test_connections_beyond_the_limit_of_an_address_are_refused_with_its_name(url: str, trust: ssl.SSLContext) -> None:
    kept = httpx.Limits(keepalive_expiry=60)
    with httpx.Client(verify=trust, headers=KEYS, limits=kept) as client:
        assert client.get(f"{url}/api/v1/healthz").status_code == 200
        held = []
        try:
            for _ in range(501):
                held.append(connect(url, trust))
            answer = answer_of(held[-1])
            assert answer.startswith("HTTP/1.1 503") and "limits.connections_per_address = 500" in answer
            assert client.get(f"{url}/api/v1/healthz").status_code == 200, "one that was there before"
        finally:
            for each in held:
                each.close()

    async def again() -> int:
        async with httpx.AsyncClient(verify=trust) as fresh:
            return (await fresh.get(f"{url}/api/v1/healthz")).status_code

    assert waiting.until(lambda: asyncio.run(again()) == 200, "room for a connection")
