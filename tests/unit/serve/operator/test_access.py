"""Access lines: which requests are told, and what a line holds."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlsys.serve.app import build_app
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits, LogSection
from rlsys.serve.keys import KeyFile
from rlsys.serve.operator.access import AccessLog, Line, as_text, ids_in
from rlsys.serve.operator.app import Operator
from tests.unit.serve.http_client import Http, pass_body
from tests.unit.serve.learner_backend import LearnerBackend

ONE = "tml-aaaaaaaa"
RUN = "0123456789abcdef" * 2


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    file = tmp_path / "keys"
    file.write_text(f"{ONE} one\n")
    file.chmod(0o600)
    return KeyFile(file)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b'{"model_id": "%b:train:3"}' % RUN.encode(), (RUN, f"{RUN}:train:3")),
        (b"/api/v1/training_runs/%b:train:0/checkpoints" % RUN.encode(), (RUN, f"{RUN}:train:0")),
        (b"\x0a\x2d" + f"{RUN}:train:12".encode() + b"\x10\x01\x80", (RUN, f"{RUN}:train:12")),
        (b'{"session_id": "%b", "base_model" : "Qwen/X"}' % RUN.encode(), (RUN, "Qwen/X")),
        (b'{"model":"tinker://x","prompt":""}', (None, "tinker://x")),
        (b'{"model":"a\nb"}', (None, None)),
        (b"", (None, None)),
    ],
)
def test_a_request_is_told_with_the_session_and_the_model_that_it_names(
    text: bytes, wanted: tuple[str | None, str | None]
) -> None:
    assert ids_in(text) == wanted


def test_a_line_of_text_stays_one_line() -> None:
    line = Line(None, "GET", "/a\nERROR forged\x1b[31m\u2028", 404, 0.1, None, None, None)
    text = as_text(line)
    assert text.isprintable() and "\\x0aERROR" in text and text.split()[2:4] == ["-", "GET"]


def test_slow_and_failed_requests_are_told_and_others_are_counted_alone(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        http = Http(backend, store, Limits(poll_s=0.3))
        state, operator = http.state, Operator(http.front)
        app = AccessLog(build_app(http.front, keys), LogSection(slow_s=0.2, json_lines=True), operator.metrics)
        http.client = client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")
        with caplog.at_level(logging.INFO, "rlsys.serve.access"):
            session = await http.session(key=ONE)
            model = await http.model(session, key=ONE)
            assert told(caplog) == []
            await http.send("POST", "forward_backward", {**pass_body(model, 1), "seq_id": "x"}, key=ONE)
            await http.send("GET", "samplers/none", key="tml-wrong-key")
            bad, wrong = told(caplog)
            assert (bad["status"], bad["tenant"], bad["session"], bad["model"]) == (400, "one", session, model)
            assert bad["method"] == "POST" and bad["path"] == "/api/v1/forward_backward" and bad["reference"] is None
            assert (wrong["status"], wrong["tenant"]) == (401, None) and "tml-wrong-key" not in caplog.text
            caplog.clear()
            backend.open.clear()
            pending = await http.forward_backward(model, 1, key=ONE)
            held = await http.send("POST", "retrieve_future", {"request_id": pending["request_id"]}, key=ONE)
            assert held.status_code == 408 and told(caplog) == [], "a poll is no slow request"
            opening = asyncio.create_task(http.send("POST", "create_session", {"tags": []}, key=ONE))
            assert (await opening).status_code == 200
            backend.open.set()
            await http.result(pending, key=ONE)
        text = operator.metrics.text(await http.controller.figures()).decode()
        assert 'rlsys_request_seconds_count{method="POST",route="/api/v1/retrieve_future",status="408"} 1.0' in text
        assert 'route="/api/v1/samplers/{sampler_id}"' in text or 'route="other"' in text
        await state.drain(20)
        await client.aclose()

    asyncio.run(main())


def told(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [json.loads(each.message) for each in caplog.records if each.name == "rlsys.serve.access"]


def test_a_failure_of_the_server_is_told_under_the_reference_of_its_answer(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        http = Http(backend, store)
        state, inner = http.state, build_app(http.front, keys)

        async def fails(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"].endswith("telemetry"):
                state.sessions = None  # type: ignore[assignment]  # a fault of the program
                scope = {**scope, "path": "/api/v1/create_session"}
            await inner(scope, receive, send)

        app = AccessLog(fails, LogSection(), Operator(http.front).metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, False), base_url="http://server") as client:
            with caplog.at_level(logging.INFO, "rlsys.serve"):
                answer = await client.post("/api/v1/telemetry", json={"tags": []}, headers={"X-API-Key": ONE})
        assert answer.status_code == 500
        reference = answer.json()["detail"].rpartition(" ")[2]
        (line,) = [each.message for each in caplog.records if each.name == "rlsys.serve.access"]
        assert f"reference={reference}" in line and " one POST " in line
        errors = [each for each in caplog.records if each.name == "rlsys.serve" and reference in each.message]
        assert len(errors) == 1 and errors[0].exc_info is not None

    asyncio.run(main())
