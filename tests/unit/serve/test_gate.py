"""What stands before all routes: limits of headers and bodies, wrong keys, host names, and what a log may hold."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.failed_keys import WINDOW_S, FailedKeys, network_of
from rlsys.serve.keys import KeyFile
from rlsys.serve.wire.json_body import OF_PASS, load
from tests.unit.serve.http_client import Http
from tests.unit.serve.learner_backend import LearnerBackend

RIGHT = "tml-0123456789"


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    file = tmp_path / "keys"
    file.write_text(f"{RIGHT} one\n")
    file.chmod(0o600)
    return KeyFile(file)


def test_wrong_keys_are_limited_by_address_and_in_all_and_forgotten_after_a_minute() -> None:
    at = [0.0]
    failed = FailedKeys(Limits(failed_keys=3, failed_keys_in_all=5), lambda: at[0])
    assert [failed.refusal("10.0.0.1").status for _ in range(4)] == [401, 401, 401, 429]
    assert [failed.refusal(f"10.0.0.{n}").status for n in range(2, 6)] == [401, 401, 429, 429]
    at[0] = WINDOW_S - 0.5
    last = failed.refusal("10.0.0.1")
    assert last.headers == {"Retry-After": "1"} and "limits.failed_keys = 3" in last.detail
    assert "limits.failed_keys_in_all = 5" in failed.refusal("10.0.0.9").detail
    at[0] = WINDOW_S
    assert failed.refusal("10.0.0.1").status == 401


def test_the_table_of_wrong_keys_is_bounded_whatever_the_number_of_addresses() -> None:
    failed = FailedKeys(Limits(failed_keys_in_all=100), lambda: 0.0)
    statuses = [failed.refusal(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}").status for n in range(20_000)]
    assert statuses.count(401) == 100 and len(failed._counts) == 100


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("unix:", "unix:"),
        ("x" * 500, "x" * 64),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(address: str, network: str) -> None:
    assert network_of(address) == network


def test_a_right_key_is_served_at_once_while_its_address_sends_wrong_ones(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(failed_keys=5), keys) as http:
            statuses = [(await http.send("GET", "sessions", key=f"tml-wrong-{n}")).status_code for n in range(20)]
            assert statuses == [401] * 5 + [429] * 15
            answer = await http.send("GET", "sessions", key=None)
            assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= 60
            began = time.process_time()
            assert (await http.send("GET", "sessions", key=RIGHT)).status_code == 200
            assert time.process_time() - began < 1
            token = (await http.post("auth/token", {}, key=RIGHT))["jwt"]
            assert (await http.send("GET", "sessions", key=token)).status_code == 200

    asyncio.run(main())


def test_a_token_ends_with_the_key_that_it_was_given_for(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile, tmp_path: Path
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            (tmp_path / "keys").write_text(f"{RIGHT} one\ntml-another-key one\n")
            tokens = [(await http.post("auth/token", {}, key=key))["jwt"] for key in (RIGHT, "tml-another-key")]
            (tmp_path / "keys").write_text("tml-another-key one\n")
            statuses = [(await http.send("GET", "sessions", key=token)).status_code for token in tokens]
            assert statuses == [401, 200]

    asyncio.run(main())


def test_headers_beyond_the_limit_are_refused_with_its_name(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(header_bytes=2000)) as http:
            assert (await http.raw("GET", "/api/v1/sessions", headers={"x": "a" * 1500}))[0] == 200
            for target, headers in (
                ("/api/v1/sessions", {"x": "a" * 2000}),
                ("/api/v1/sessions", {f"x{n}": "a" for n in range(400)}),
                ("/api/v1/healthz?" + "a" * 2000, {}),
                ("/api/v1/" + "a" * 2000, {}),
            ):
                status, text = await http.raw("GET", target, headers=headers)
                assert status == 431 and "limits.header_bytes" in text

    asyncio.run(main())


def test_bodies_are_limited_by_call_and_all_bodies_of_a_tenant_together(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        limits = Limits(body_bytes=40_000, call_bytes=10_000, held_bytes=100_000)
        async with Http(backend, store, limits) as http:
            big, small = b" " * 20_000, b" " * 9_000
            assert "limits.call_bytes" in await http.refused("asample", content=big, status=413)
            assert "limits.body_bytes" in await http.refused("forward_backward", content=big * 3, status=413)
            assert "no valid JSON" in await http.refused("forward_backward", content=big)
            assert (await http.raw("GET", "/api/v1/healthz", b"x" * 2000, key=""))[0] == 413

            held, release = asyncio.Event(), asyncio.Event()
            slow = 0

            async def send_slowly() -> list[dict[str, Any]]:
                nonlocal slow
                found: list[dict[str, Any]] = []
                given = 0

                async def receive() -> dict[str, Any]:
                    nonlocal given, slow
                    given += 1
                    if given == 1:
                        return {"type": "http.request", "body": small, "more_body": True}
                    slow += 1
                    if slow == 11:
                        held.set()
                    await release.wait()
                    return {"type": "http.request", "body": b"", "more_body": False}

                async def send(message: Any) -> None:
                    found.append(message)

                headers = [(b"x-api-key", b"tml-one"), (b"host", b"localhost")]
                scope = {
                    "type": "http", "method": "POST", "path": "/api/v1/asample", "headers": headers, "scheme": "http",
                    "query_string": b"", "raw_path": b"/api/v1/asample", "root_path": "", "client": ("127.0.0.1", 1),
                }  # fmt: skip
                await http.app(scope, receive, send)
                return found

            senders = [asyncio.create_task(send_slowly()) for _ in range(11)]
            await asyncio.wait_for(held.wait(), 30)
            answer = await http.send("POST", "asample", content=small)
            assert answer.status_code == 429 and "limits.held_bytes = 100000" in answer.json()["detail"]
            assert (await http.send("GET", "sessions")).status_code == 200
            release.set()
            assert {each[0]["status"] for each in await asyncio.gather(*senders)} == {400}
            assert "no valid JSON" in await http.refused("asample", content=small)

    asyncio.run(main())


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3"]
)
def test_without_keys_this_machines_names_are_served(
    host: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            assert (await http.raw("GET", "/api/v1/sessions", headers={"host": host}))[0] == 200

    asyncio.run(main())


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "x"])
def test_without_keys_a_page_that_was_led_here_by_name_is_refused(
    host: str, backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            status, text = await http.raw("GET", "/api/v1/sessions", headers={"host": host})
            assert status == 403 and "Host: found" in text
        async with Http(backend, store, keys=keys) as http:
            assert (await http.raw("GET", "/api/v1/sessions", headers={"host": host}, key=RIGHT))[0] == 200

    asyncio.run(main())


def test_a_path_is_never_redirected(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            assert (await http.raw("GET", "/api/v1/sessions/", headers={"host": "localhost"}))[0] == 404
            assert (await http.raw("POST", "/api/v1/asample/"))[0] == 404

    asyncio.run(main())


def test_logs_hold_no_key_no_signed_address_and_no_line_of_a_clients_making(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(failed_keys=2), keys=keys) as http:
            http.state.store = None  # type: ignore[assignment]  # every use of it is an internal error
            secret = http.front.signer.key_for("one", b"x")
            with caplog.at_level(logging.DEBUG, "rlsys"):
                for target in (f"/api/v1/files/{secret}", "/api/v1/training_runs/a%0aFORGED", "/api/v1/checkpoints"):
                    await http.raw("GET", target, key=RIGHT)
                for key in ("tml-wrong-one", "tml-wrong-two", secret):
                    await http.raw("GET", "/api/v1/sessions", key=key)
                url, _ = http.front.signer.link(http_download())
                status, text = await http.raw("GET", f"/api/v1/files/{url}")
                assert status == 500 and "reference" in text
            shown = "\n".join(f"{each.getMessage()}" for each in caplog.records)
            assert "/api/v1/files/..." in shown and "reference" in shown
            for hidden in (RIGHT, "wrong-one", "wrong-two", secret, url, "\nFORGED"):
                assert hidden not in shown and hidden not in text, hidden

    def http_download() -> Any:
        from rlsys.serve.signing import Download

        return Download("one", f"tinker://{'0' * 32}:train:0/weights/w", "", "")

    asyncio.run(main())


def many(text: bytes, number: int) -> bytes:
    return b",".join([text] * number)


PASS = b'{"model_id":"a","seq_id":1,"forward_backward_input":{"loss_fn":"a","data":'


def numbered(value: bytes, number: int) -> bytes:
    """Members of an object, each with a key of its own."""
    return b",".join(b'"%d":%b' % (n, value) for n in range(number))


# Made by the test: together they have 100 MB.
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "one key twice at the end": ("create_session", lambda: b"{" + numbered(b"0", 300_000) + b',"0":1}'),
    "keys": ("create_session", lambda: b"{" + numbered(b"0", 700_000) + b"}"),
    "tags": ("create_session", lambda: b'{"tags":[' + many(b"1", 3_900_000) + b"]}"),
    "texts for tokens": ("asample", lambda: b'{"prompt":{"chunks":[{"tokens":[' + many(b'"a"', 2_000_000) + b"]}]}}"),
    "numbers for chunks": ("asample", lambda: b'{"prompt":{"chunks":[' + many(b"1", 3_900_000) + b"]}}"),
    "nulls for stops": ("asample", lambda: b'{"sampling_params":{"stop":[' + many(b"null", 1_600_000) + b"]}}"),
    "objects": ("asample", lambda: b"[" + many(b"{}", 2_700_000) + b"]"),
    "lists": ("asample", lambda: b"[" + many(b"[]", 2_700_000) + b"]"),
    "brackets": ("asample", lambda: b"[" * 8_000_000),
    "digits": ("asample", lambda: b'{"seq_id":' + b"9" * 8_000_000 + b"}"),
    "exponents": ("asample", lambda: b"[" + many(b"1e9", 2_000_000) + b"]"),
    "escapes": ("asample", lambda: b'{"a":"' + rb"\u0041" * 1_300_000 + b'"}'),
    "statuses": ("sessions/search", lambda: b'{"statuses":[' + many(b"1", 3_900_000) + b"]}"),
    "numbers for datums": ("forward_backward", lambda: PASS + b"[" + many(b"1", 4_000_000) + b"]}}"),
    "inputs": (
        "forward_backward",
        lambda: PASS + b'[{"model_input":{"chunks":[]},"loss_fn_inputs":{' + numbered(b"0", 290_000) + b"}}]}}",
    ),
    "configuration": (
        "forward_backward",
        lambda: PASS + b'[],"loss_fn_config":{' + numbered(b"[]", 290_000) + b"}}}",
    ),
}


@pytest.mark.parametrize(("call", "hostile"), HOSTILE.values(), ids=HOSTILE)
def test_a_body_that_is_costly_to_read_is_refused_within_a_second(
    call: str, hostile: Callable[[], bytes], backend: LearnerBackend, store: CheckpointStore
) -> None:
    body = hostile()

    async def main() -> None:
        async with Http(backend, store) as http:
            began = time.process_time()
            response = await http.send("POST", call, content=body)
            assert time.process_time() - began < 1.0 and response.status_code == 400, response.text

    gc.collect()
    gc.freeze()  # a collection would search the objects of all other tests; nor need later ones do so
    asyncio.run(main())


METADATA = {
    "infinite": (b'{"a": 1e400}', "number beyond 1e308"),
    "half a character": (b'{"a": "\\ud800"}', "lone surrogate"),
    "half a character in a key": (b'{"a": {"\\udfff": 1}}', "lone surrogate"),
    "deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "more than 64 levels"),
    "deep objects": (b'{"a": ' + b'{"a":' * 100 + b"1" + b"}" * 101, "more than 64 levels"),
}


@pytest.mark.parametrize(("metadata", "message"), METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("call", ["create_session", "create_model", "save_weights"])
def test_metadata_that_could_not_be_stored_or_given_back_is_refused(
    call: str, metadata: bytes, message: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session = await http.session()
            model = await http.model(session)
            names = {"session_id": session, "model_seq_id": 1, "base_model": "tiny", "model_id": model, "seq_id": 1}
            body = json.dumps({**names, "path": "w"})[:-1].encode() + b', "user_metadata": ' + metadata + b"}"
            assert message in await http.refused(call, content=body)

    asyncio.run(main())


def test_the_limits_of_json_let_the_largest_real_bodies_through() -> None:
    tokens = b'{"tokens":[' + many(b"151643", 1_000_000) + b"]}"
    assert len(load(tokens)["tokens"]) == 1_000_000
    datum = b'{"a":{"data":[1],"dtype":"x","shape":[1]},"b":{"data":[1]},"c":{"data":[1]},"d":{"data":[1]}}'
    assert len(load(b"[" + many(datum, 4096) + b"]", OF_PASS)) == 4096
    chunks = b'{"chunks":[' + many(b'{"tokens":[1]}', 100) + b"]}"
    assert len(load(b"[" + many(chunks, 1024) + b"]", OF_PASS)) == 1024
